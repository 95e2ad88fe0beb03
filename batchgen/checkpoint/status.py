"""How far a run is, from its files alone: safe at any time, from any host, and never in the run's way."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from batchgen.checkpoint.attempt import Attempt, attempts, list_possibly_live
from batchgen.checkpoint.done import Done
from batchgen.checkpoint.files import CheckpointError
from batchgen.checkpoint.folder import RunFolder
from batchgen.checkpoint.heartbeats import all_heartbeats
from batchgen.types import WHOLE, ExitCode, Shard

State = Literal["new", "running", "stopped", "finished"]
ShardState = Literal["missing", "running", "failed", "finished"]


@dataclass(frozen=True, slots=True)
class AttemptStatus:
    """One start of the run."""

    number: int
    where: str
    shard: str  # the rows it is for, like 3/8; 0/1 is all of them
    started: float  # Unix time
    ended: str | None  # how, in words; None: it works, or died
    live: bool  # it beat less than its limit ago; a guess where the clocks of two hosts differ
    ranks: int
    generated_tokens: int  # all it generated, as its heartbeats count
    lost_tokens: int  # of these, in batches that were never recorded


@dataclass(frozen=True, slots=True)
class Status:
    """A run, or one shard of it, over all attempts."""

    folder: Path
    shard: Shard  # what the numbers of rows are about
    state: State
    rows: int
    good: int  # rows with a generation
    failed: int  # rows whose every attempt failed
    open: int  # rows without a record
    prompt_tokens: int  # of recorded batches
    generated_tokens: int
    batches: int
    incomplete: int  # rows of the run that were cut by their length before their text was what its constraint demands
    reasoning_tokens: int  # of the generated tokens, of models that think
    merged: bool  # the output files are there, and have all that is recorded
    tokens_per_second: float  # generated tokens of the last attempt by wall time; 0 without one
    eta_seconds: float | None  # from tokens a row and tokens a second; None if unknown
    attempts: list[AttemptStatus]
    shards: list[ShardState]
    """Of each shard, where a job array does the run: missing, nobody has begun; failed, it has ended with open rows."""

    @property
    def exit_code(self) -> int:
        """0 all rows good, 3 finished with failed rows, 75 not finished or not merged: start again to go on.

        A shard need not be merged: whoever finishes the last one does it.
        """
        if self.open or (self.shard == WHOLE and not self.merged):
            return ExitCode.RESUMABLE
        return ExitCode.SOME_FAILED if self.failed else ExitCode.ALL_GOOD


def status(folder: RunFolder, shard: Shard = WHOLE, *, verify: bool = False) -> Status:
    """Reads the state of the run in `folder`, or of the rows of `shard` in it.

    Raises:
        CheckpointError: it is no run folder.
    """
    if not folder.path.is_dir():
        raise CheckpointError(f"there is no run folder {folder.path}")
    done = folder.done(int(folder.read_identity()["rows"]), verify=verify)
    part = done.part(shard)
    starts = [attempt for attempt in attempts(folder) if attempt.shard.overlaps(shard)]
    perhaps = {attempt.number for attempt in list_possibly_live(starts)}
    heartbeats = all_heartbeats(folder)
    states = [
        _attempt(
            start,
            list(heartbeats.get(start.number, {}).values()),
            done.attempt_tokens.get(start.number, 0),
            start.number in perhaps,
        )
        for start in starts
    ]
    works = [start for start, state in zip(starts, states, strict=True) if state.live]
    merged = folder.merged()
    ended: State = "finished" if merged and not part.open else "stopped" if starts else "new"
    # The speed of the attempts that work now; if none works, the speed of the last one.
    tokens_per_second = sum(_rate(start, done.attempt_tokens.get(start.number, 0)) for start in works or starts[-1:])
    eta = _eta(done, tokens_per_second) if works else None
    return Status(
        folder=folder.path,
        shard=shard,
        state="running" if works else ended,
        rows=len(part.states),
        good=part.good,
        failed=part.failed,
        open=part.open,
        prompt_tokens=done.prompt_tokens,
        generated_tokens=done.generated_tokens,
        batches=done.batches,
        incomplete=done.incomplete,
        reasoning_tokens=done.reasoning_tokens,
        merged=merged,
        tokens_per_second=round(tokens_per_second, 2),
        eta_seconds=None if eta is None else round(eta, 1),
        attempts=states,
        shards=_shards(done, states),
    )


def _shards(done: Done, states: list[AttemptStatus]) -> list[ShardState]:
    """State of each shard of the last start that had a part of the rows."""
    count = next((Shard.parse(state.shard).count for state in reversed(states) if state.shard != str(WHOLE)), 0)
    is_worked_on: dict[int, bool] = {}  # by the index of each shard that an attempt has begun
    for state in states:
        shard = Shard.parse(state.shard)
        if shard.count == count:
            is_worked_on[shard.index] = is_worked_on.get(shard.index, False) or state.live
    names: list[ShardState] = []
    for index in range(count):
        if not done.part(Shard(index, count)).open:
            names.append("finished")
        elif index not in is_worked_on:
            names.append("missing")
        else:
            names.append("running" if is_worked_on[index] else "failed")
    return names


def _eta(done: Done, tokens_per_second: float) -> float | None:
    settled = done.good + done.failed
    if not tokens_per_second or not settled:
        return None
    return done.open * (done.generated_tokens / settled) / tokens_per_second


def _attempt(attempt: Attempt, heartbeats: list[dict[str, Any]], committed: int, perhaps_live: bool) -> AttemptStatus:
    generated = max(sum(int(heartbeat.get("generated_tokens", 0)) for heartbeat in heartbeats), committed)
    return AttemptStatus(
        number=attempt.number,
        where=attempt.where,
        shard=str(attempt.shard),
        started=float(attempt.claim.get("started", 0.0)),
        ended=attempt.ended,
        live=perhaps_live and attempt.ended is None and _shows_life(attempt, heartbeats),
        ranks=len(heartbeats),
        generated_tokens=generated,
        lost_tokens=generated - committed,
    )


def _shows_life(attempt: Attempt, heartbeats: list[dict[str, Any]]) -> bool:
    here = attempt.is_here()
    if here is not None:
        return here
    last = max(
        [float(heartbeat.get("time", 0.0)) for heartbeat in heartbeats],
        default=float(attempt.claim.get("started", 0.0)),
    )
    return time.time() - last < attempt.limit


def _rate(attempt: Attempt, committed: int) -> float:
    """Recorded tokens a second of wall time since the first rank was ready."""
    heartbeats = attempt.heartbeats().values()
    ready = [float(heartbeat["ready"]) for heartbeat in heartbeats if heartbeat.get("ready")]
    if not ready:
        return 0.0
    last = max(float(heartbeat["time"]) for heartbeat in heartbeats)
    return committed / (last - min(ready)) if last > min(ready) else 0.0
