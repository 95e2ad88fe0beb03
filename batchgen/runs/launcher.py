"""Starts the ranks of `batchgen run --ranks N` on this host, and sees to it that none outlives the starter.

The starter claims the run folder, starts its own command N times, passes signals on, waits, and merges; it loads no
model. The variables it sets are torchrun's, so that an engine cannot tell the difference.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from batchgen.checkpoint import FINAL, Attempt
from batchgen.runs import stacks
from batchgen.runs.stacks import ANSWER_SECONDS
from batchgen.runs.stop import Stop
from batchgen.runs.watchdog import Ranks, report, stalled
from batchgen.types import ExitCode, UserError
from batchgen.world import free_port

logger = logging.getLogger(__name__)

GRACE_SECONDS = 30.0  # for the other ranks to commit and end after one has died
_PR_SET_PDEATHSIG = 1  # see prctl(2)
_TOLD_TO = "BATCHGEN_TOLD_TO"  # the file descriptor that a rank tells its starter by
_MOST_TOLD = 16_384  # bytes of a sentence: a pipe holds more, so that nobody waits


class RankError(UserError):
    """Ranks cannot run: what they have told their starter, each sentence once, with the ranks that it is of."""


class Rank(subprocess.Popen[bytes]):
    """The process of one rank, and what it has told this one of its end."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self._pipe, end = os.pipe()
        os.set_blocking(self._pipe, False)
        self._told = b""
        try:
            # A session of its own: an interrupt at the terminal reaches the starter alone, which passes it on once.
            super().__init__(
                [sys.executable, "-m", "batchgen", *command],
                env={**variables, _TOLD_TO: str(end)},
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout carries results only, whatever a library prints
                start_new_session=True,
                pass_fds=[end],
            )
        finally:
            os.close(end)

    @property
    def told(self) -> str:
        """Why it has ended, or ends; empty if it has not said so."""
        with suppress(BlockingIOError):
            while data := os.read(self._pipe, 1 << 16):
                self._told += data
        return self._told.decode("utf-8", "replace").strip()

    def close(self) -> None:
        """Ends it, if it has not ended, and forgets what it told."""
        self.kill()
        self.wait()
        os.close(self._pipe)


def tell_starter(sentence: str, environment: Mapping[str, str]) -> bool:
    """Tells the process that has started this rank why it ends; False: there is none, or it is gone."""
    try:
        os.write(int(environment[_TOLD_TO]), sentence.encode("utf-8", "replace")[:_MOST_TOLD])
    except (KeyError, ValueError, OSError):
        return False
    return True


def start_ranks(
    attempt: Attempt | None,
    command: Sequence[str],
    count: int,
    stop: Stop,
    environment: Mapping[str, str],
    stall_seconds: float = 0.0,
) -> list[int]:
    """Runs `python -m batchgen COMMAND…` as `count` ranks to their end; gives their exit codes, negative for a signal.

    They belong to `attempt`, unless what they do is no run.

    If one rank dies, the others get SIGTERM, and `GRACE_SECONDS` later SIGKILL; at once if those that are left are
    frozen. A rank that makes no progress for `stall_seconds` (0: any time) is one that has died, after all ranks'
    stacks have been logged.

    Raises:
        RankError: ranks cannot run, and have told why.
    """
    port = free_port()
    ranks: list[Rank] = []
    try:
        numbers = range(0 if stop() else count)
        ranks.extend(Rank(command, _variables(attempt, rank, count, port, environment)) for rank in numbers)
        codes = _wait(ranks, stop, attempt, stall_seconds)
        told = {number: rank.told for number, rank in enumerate(ranks) if rank.returncode == ExitCode.CANNOT_RUN}
    finally:
        for rank in ranks:
            rank.close()
    if any(told.values()):
        raise RankError(_each_once(told, count))
    return codes


def _each_once(told: Mapping[int, str], count: int) -> str:
    """The sentences of ranks, each with the ranks that it is of; alone, if it is of all that there are."""
    if set(told) == set(range(count)) and len(set(told.values())) == 1:
        return told[0]
    sentences = dict.fromkeys(sentence for sentence in told.values() if sentence)
    return "\n".join(f"{in_words(n for n in told if told[n] == sentence)}: {sentence}" for sentence in sentences)


def in_words(ranks: Iterable[int]) -> str:
    """Ranks by their numbers, for a sentence."""
    *first, last = map(str, ranks)
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"


def _variables(
    attempt: Attempt | None, rank: int, count: int, port: int, environment: Mapping[str, str]
) -> dict[str, str]:
    # In a one-process torchrun, that one's store would be taken for that of these ranks.
    variables = {name: value for name, value in environment.items() if not name.startswith("TORCHELASTIC_")}
    # As torchrun does, but all cores: N ranks with a thread a core each would get in each other's way.
    variables.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    variables.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        BATCHGEN_STARTER=str(os.getpid()),
    )
    if attempt is not None:
        variables["BATCHGEN_ATTEMPT"] = str(attempt.number)
    return variables


def _wait(ranks: list[Rank], stop: Stop, attempt: Attempt | None, stall_seconds: float) -> list[int]:
    passed_on: int | None = None
    deadline: float | None = None
    watched = Ranks(attempt, stall_seconds) if attempt is not None else None
    works = True
    while works:
        works = bool(_alive(ranks))  # asked first: the last death is looked at, too
        if works and attempt is not None and watched is not None and deadline is None:
            for rank in _ended_for_standing(ranks, attempt, watched, stall_seconds):
                rank.wait()
        if stop.signal is not None and passed_on is None:
            passed_on = stop.signal
            _send(ranks, passed_on)
        if deadline is None and any(rank.returncode for rank in ranks):
            dead = next(number for number, rank in enumerate(ranks) if rank.returncode)
            if passed_on is None or ranks[dead].returncode != -passed_on:  # that one came before the rank's handler
                reason = _death(dead, ranks[dead], attempt)
                if ranks[dead].returncode != ExitCode.CANNOT_RUN or not ranks[dead].told:  # else it is said at the end
                    logger.error("%s%s", reason, "; ending the others" if _alive(ranks) else "")
                # The watchdog of a rank has more to say.
                requested = stacks.requested(attempt) if attempt is not None else None
                stop.request(reason if requested is None else requested[0])
            _send(ranks, signal.SIGTERM)
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and (time.monotonic() > deadline or all(map(_is_frozen, _alive(ranks)))):
            _send(ranks, signal.SIGKILL)
        time.sleep(0.05 if works else 0.0)
    return [rank.returncode for rank in ranks]


def _death(number: int, rank: Rank, attempt: Attempt | None) -> str:
    """How rank `number` has died, in words, and what it had in work."""
    if rank.told:
        return f"rank {number} died: {rank.told}"
    how = f"exit code {rank.returncode}"
    if rank.returncode < 0:
        how = f"killed by {signal.Signals(-rank.returncode).name}"
        how += ", as the system does when memory runs out" if rank.returncode == -signal.SIGKILL else ""
    heartbeat = attempt.heartbeats().get(number, {}) if attempt is not None else {}
    in_work = str(heartbeat.get("in_work") or "") if heartbeat.get("state") not in FINAL else ""
    return f"rank {number} died ({how})" + (f" with {in_work} in work" if in_work else "")


def _ended_for_standing(ranks: list[Rank], attempt: Attempt, watched: Ranks, seconds: float) -> list[Rank]:
    """Those that could not watch themselves, and now are killed."""
    standing = watched.standing([number for number, rank in enumerate(ranks) if rank.poll() is None])
    if standing and not report(attempt, stalled(attempt, seconds, standing)):
        with suppress(subprocess.TimeoutExpired):
            ranks[standing[0]].wait(timeout=ANSWER_SECONDS)  # a rank has noticed it too, and is asking them
    for number in standing:
        ranks[number].kill()
    return [ranks[number] for number in standing]


def _is_frozen(rank: Rank) -> bool:
    """Whether it is stopped (SIGSTOP): it will not hear SIGTERM however long one waits. See proc(5)."""
    try:
        return Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _send(ranks: list[Rank], number: int) -> None:
    for rank in _alive(ranks):
        rank.send_signal(number)


def _alive(ranks: list[Rank]) -> list[Rank]:
    # All are asked every time: with `any` alone, nobody would see rank 1 die while rank 0 lives.
    return [rank for rank in ranks if rank.poll() is None]


def die_with(starter: int) -> None:
    """Lets the kernel kill this process when its parent, the starter, is gone, however that one died."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != starter:  # it died before we asked
        os._exit(ExitCode.RESUMABLE)
