"""Ends a run that makes no progress: says which rank stands still and where all of them are, and leaves it resumable.

Each rank watches itself, from a thread of its own. One that is frozen, or whose interpreter a library holds, cannot; so
the starter watches all of its ranks by their heartbeats, and under another launcher rank 0 does.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

from batchgen.checkpoint import FINAL, JOIN_SECONDS, Attempt, CheckpointError
from batchgen.checkpoint.process import myself
from batchgen.engine import Engine
from batchgen.runs import stacks
from batchgen.types import ExitCode

logger = logging.getLogger(__name__)

STALL_SECONDS = 1800.0  # a step of the largest models takes minutes where their weights come from a disk
FIRST_STEP_SECONDS = 600.0  # at least, until the first step has been made: compiling is a part of it

_LONGEST = 3  # times the longest step so far is never too long
_GRACE_SECONDS = 30.0  # for a rank that is asked to end because of another one


class Still:
    """Measures for how long a count has not changed, as seen by one who looks every `pause` seconds.

    Time in which the one who looks was itself stopped does not count: Slurm suspends whole jobs, and lets them go on.
    """

    def __init__(self, seconds: float, pause: float) -> None:
        self._least, self._pause = seconds, pause
        self._count: tuple[int, ...] = ()
        self._looked = time.monotonic()
        self._longest = 0.0
        self.seconds = 0.0

    def look(self, count: tuple[int, ...], *, rest: bool = False) -> None:
        """Takes the count as it is now; all of it is 0 before the first step. `rest`: it may stand still."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * self._pause), now
        if rest:
            self.seconds = 0.0
        elif count == self._count:
            self.seconds += passed
        else:
            if any(self._count):
                self._longest = max(self._longest, self.seconds)
            self._count, self.seconds = count, 0.0

    @property
    def too_long(self) -> bool:
        """Whether that is a stall."""
        if not self._least:
            return False
        usual = _LONGEST * self._longest if any(self._count) else FIRST_STEP_SECONDS
        return self.seconds > max(self._least, usual)


def pause_of(seconds: float) -> float:
    """How often to look for a limit of `seconds`."""
    return min(5.0, seconds / 4) if seconds else 5.0


class Ranks:
    """Watches ranks by their heartbeats, from another process."""

    def __init__(self, attempt: Attempt, seconds: float) -> None:
        self._attempt = attempt
        self._pause = pause_of(seconds)
        # A rank that can watch itself shall come first.
        interval = float(attempt.claim["heartbeat_seconds"])
        self._seconds = seconds + 2 * interval + 2 * self._pause if seconds else 0.0
        self._still: dict[int, Still] = {}
        self._next = 0.0

    def standing(self, ranks: Collection[int] | None = None) -> list[int]:
        """Those of `ranks` that have made no progress for too long; None: of the others that have not ended. Reads the
        run folder now and then only."""
        if not self._seconds or time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + self._pause
        try:
            heartbeats = self._attempt.heartbeats()
        except CheckpointError:
            return []  # a file system has its moments; whoever watches must not end of them
        if ranks is None:
            ranks = [rank for rank, heartbeat in heartbeats.items() if rank > 0 and heartbeat.get("state") not in FINAL]
        for rank in ranks:
            still = self._still.setdefault(rank, Still(self._seconds, self._pause))
            still.look(progress(heartbeats.get(rank, {})))
        return [rank for rank in ranks if self._still[rank].too_long]


def progress(heartbeat: Mapping[str, Any]) -> tuple[int, ...]:
    """What a rank has done, by its heartbeat: numbers of which one changes at every step. While it loads, or waits for
    others because its own part is done, every beat is progress."""
    if heartbeat.get("state") == "loading" or heartbeat.get("at_ease"):
        return (0, int(heartbeat.get("beat", 0)))
    return tuple(
        int(heartbeat.get(name, 0)) for name in ("steps", "generated_tokens", "rows", "failed", "refused_again")
    )


def report(attempt: Attempt, why: str) -> bool:
    """Logs `why` with the stacks of all ranks; False: another process is doing that."""
    try:
        if not stacks.request(attempt, why):
            stacks.answer()
            return False
    except OSError as error:
        logger.warning("cannot ask other hosts for their stacks: %s", error)
    logger.error("%s. Ending; the same command goes on", why)
    _log_stacks(attempt)
    return True


def _log_stacks(attempt: Attempt) -> None:
    try:
        for _, text in sorted(stacks.collect(attempt).items()):
            logger.error("%s", text)
    except (CheckpointError, OSError) as error:
        logger.error("cannot say where the ranks stand: %s", error)


class Watchdog(threading.Thread):
    """While entered, ends this process if `engine` makes no step for `seconds`, or for as long as its `patience`.

    A thread that waits inside a collective or a library is out of reach of signals and exceptions; so the whole process
    goes, and what is recorded stays. Whoever holds the claim watches the other ranks, too.

    Args:
        count: this rank's heartbeat as it is now.
        ask_to_stop: ends the run cleanly, for a reason, where this rank still can.
        seconds: without progress; 0: only `engine.signs.timeout_seconds` counts.
    """

    def __init__(
        self,
        engine: Engine,
        attempt: Attempt,
        rank: int,
        count: Callable[[], Mapping[str, Any]],
        ask_to_stop: Callable[[str], None],
        seconds: float,
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._engine, self._attempt, self._rank = engine, attempt, rank
        self._count, self._ask_to_stop, self._seconds = count, ask_to_stop, seconds
        self._others = Ranks(attempt, seconds)
        self._holds_the_claim = all(attempt.claim.get(name) == value for name, value in myself().items())
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        pause = min(pause_of(self._seconds), pause_of(self._engine.signs.timeout_seconds or 0.0))
        own, step = Still(self._seconds, pause), Still(0.0, pause)
        while not self._ended.wait(pause):
            patience = self._engine.signs.timeout_seconds
            waits = self._others_load()
            own.look(progress(self._count()), rest=self._engine.signs.is_waiting or waits)
            step.look((self._engine.signs.steps, self._engine.signs.idle_reports), rest=patience is None or waits)
            if patience is not None and step.seconds > patience:
                self._end(patience, self._engine.signs.awaited_ranks)
            if own.too_long:
                self._end(
                    own.seconds, self._engine.signs.awaited_ranks if self._engine.calls_together else (self._rank,)
                )
            if self._holds_the_claim and (standing := self._others.standing()):
                report(self._attempt, stalled(self._attempt, self._seconds, standing))
            requested = stacks.requested(self._attempt)
            if requested is not None:
                self._leave(*requested)
                return

    def _others_load(self) -> bool:
        """Whether this rank's first step waits for one that loads, and whose heart beats."""
        if not self._engine.calls_together or self._engine.signs.steps:
            return False
        awaited, now = self._engine.signs.awaited_ranks, time.time()
        max_age = _oldest_heartbeat(self._attempt, self._engine.signs.timeout_seconds or self._seconds)
        try:
            heartbeats = self._attempt.heartbeats().items()
        except CheckpointError:
            return False
        awaited_ranks = [heartbeat for rank, heartbeat in heartbeats if awaited is None or rank in awaited]
        return any(
            heartbeat.get("state") == "loading" and now - float(heartbeat["time"]) < max_age
            for heartbeat in awaited_ranks
        )

    def _end(self, seconds: float, awaited: Collection[int] | None) -> None:
        try:
            why = stalled(self._attempt, seconds, awaited)
            if not report(self._attempt, why):
                self._ended.wait(stacks.ANSWER_SECONDS)  # whoever noticed it before us is asking us
            elif not self._has_starter():
                self._attempt.end(why)
        except Exception:
            logger.exception("no step for %.0f s, and this cannot be said as it should", seconds)
        finally:  # whatever else does not work, on a dead file system for one
            os._exit(ExitCode.RESUMABLE)

    def _has_starter(self) -> bool:
        """Whether the claim is that of no rank: then its process writes how the attempt has ended."""
        claim = self._attempt.claim
        return all(heartbeat.get("pid") != claim["pid"] for heartbeat in self._attempt.heartbeats().values())

    def _leave(self, why: str, noticed_here: bool) -> None:
        """Another rank stands still."""
        if not noticed_here:
            _log_stacks(self._attempt)
        stacks.answer()
        deadline = time.monotonic() + stacks.ANSWER_SECONDS
        while not stacks.has_answered(self._attempt, self._rank) and time.monotonic() < deadline:
            time.sleep(0.1)  # whoever noticed it is asking us where we are
        self._ask_to_stop(why)
        if not self._ended.wait(_GRACE_SECONDS):
            os._exit(ExitCode.RESUMABLE)


def await_ranks(attempt: Attempt, size: int) -> bool:
    """Lets rank 0 of an outside launcher stay until all `size` ranks have ended; False: some have stopped answering.

    No collective: it looks into the run folder.
    """
    before: object = None
    changed = time.monotonic()
    while True:
        heartbeats = attempt.heartbeats()
        if len(heartbeats) == size and all(heartbeat["state"] in FINAL for heartbeat in heartbeats.values()):
            return True
        if heartbeats != before:
            before, changed = heartbeats, time.monotonic()
        patience = attempt.limit if len(heartbeats) == size else JOIN_SECONDS
        if time.monotonic() - changed > patience:
            waited = time.monotonic() - changed
            report(attempt, stalled(attempt, waited, [rank for rank, heartbeat in heartbeats.items() if rank > 0]))
            return False
        time.sleep(0.1)


def stalled(attempt: Attempt, seconds: float, awaited: Collection[int] | None) -> str:
    """The sentence about a run in which `awaited` have made no step for this many seconds."""
    return f"no step for {seconds:.0f} s: {culprits(attempt, seconds, awaited)}"


def culprits(attempt: Attempt, patience: float, awaited: Collection[int] | None = None) -> str:
    """The ranks that the others have waited for, in words, after `patience` seconds without a step.

    Of the `awaited` ranks, or all, that have not ended: those whose heartbeat has stopped, as a frozen process's or a
    cut-off node's does; if all beat, those with the fewest steps.
    """
    heartbeats = {
        rank: heartbeat
        for rank, heartbeat in attempt.heartbeats().items()
        if heartbeat.get("state") not in FINAL and (awaited is None or rank in awaited)
    }
    if not heartbeats:
        names = ", ".join(f"rank {rank}" for rank in awaited or ())
        return f"{names} did not begin, or does not come to its end" if names else "no rank has a heartbeat"
    now = time.time()
    ages = {rank: now - float(heartbeat["time"]) for rank, heartbeat in heartbeats.items()}
    steps = {rank: int(heartbeat.get("steps", 0)) for rank, heartbeat in heartbeats.items()}
    max_age = _oldest_heartbeat(attempt, patience)
    fewest = min(steps.values())
    named = [rank for rank in heartbeats if ages[rank] > max_age] or [
        rank for rank in heartbeats if steps[rank] == fewest
    ]
    if len(named) == len(heartbeats) > 1:
        return f"all ranks stand at step {fewest} and their heartbeats move: they wait for each other inside it"
    words = [
        f"rank {rank} (process {heartbeats[rank].get('pid')} on {heartbeats[rank].get('host')}, "
        f"last heartbeat {ages[rank]:.0f} s ago)"
        for rank in named
    ]
    return f"{', '.join(words)} stopped answering at step {min(steps[rank] for rank in named)}"


def _oldest_heartbeat(attempt: Attempt, patience: float) -> float:
    """Seconds after which a heartbeat has stopped, to those who wait for `patience` seconds."""
    return max(patience / 2, 3 * float(attempt.claim["heartbeat_seconds"]))
