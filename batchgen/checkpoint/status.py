"""How far a run is, from its files alone: safe at any time, from any host, and never in the run's way."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from batchgen.checkpoint.attempt import Attempt, attempts
from batchgen.checkpoint.files import CheckpointError
from batchgen.checkpoint.folder import RunFolder

State = Literal["new", "running", "stopped", "finished"]


@dataclass(frozen=True, slots=True)
class AttemptStatus:
    """One start of the run."""

    number: int
    where: str
    started: float  # Unix time
    ended: str | None  # how, in words; None: it works, or died
    live: bool  # it beat less than its limit ago; a guess where the clocks of two hosts differ
    ranks: int
    generated_tokens: int  # all it generated, as its heartbeats count
    lost_tokens: int  # of these, in batches that were never recorded


@dataclass(frozen=True, slots=True)
class Status:
    """A run, over all its attempts."""

    folder: Path
    state: State
    rows: int
    good: int  # rows with a generation
    failed: int  # rows whose every attempt failed
    open: int  # rows without a record
    prompt_tokens: int  # of recorded batches
    generated_tokens: int
    batches: int
    merged: bool  # the output files are there
    tokens_per_second: float  # generated tokens of the last attempt by wall time; 0 without one
    eta_seconds: float | None  # from tokens a row and tokens a second; None if unknown
    attempts: list[AttemptStatus]

    @property
    def exit_code(self) -> int:
        """0 all rows good, 3 finished with failed rows, 75 not finished or not merged: start again to go on."""
        if self.open or not self.merged:
            return 75
        return 3 if self.failed else 0


def status(folder: RunFolder, *, verify: bool = False) -> Status:
    """Reads the state of the run in `folder`.

    Raises:
        CheckpointError: it is no run folder.
    """
    if not folder.path.is_dir():
        raise CheckpointError(f"there is no run folder {folder.path}")
    rows = int(folder.asked()["rows"])
    done = folder.done(rows, verify=verify)
    starts = attempts(folder)
    known = [_attempt(attempt, done.attempt_tokens.get(attempt.number, 0), attempt is starts[-1]) for attempt in starts]
    live = bool(known) and known[-1].live
    tokens_per_second = _rate(starts[-1], done.attempt_tokens.get(starts[-1].number, 0)) if starts else 0.0
    settled = done.good + done.failed
    eta = None
    if live and tokens_per_second and settled:
        eta = done.open * (done.generated_tokens / settled) / tokens_per_second
    merged = any((folder.path / f"generations.{ending}").exists() for ending in ("jsonl", "parquet", "arrow"))
    ended: State = "finished" if merged and not done.open else "stopped" if starts else "new"
    return Status(
        folder=folder.path,
        state="running" if live else ended,
        rows=rows,
        good=done.good,
        failed=done.failed,
        open=done.open,
        prompt_tokens=done.prompt_tokens,
        generated_tokens=done.generated_tokens,
        batches=done.batches,
        merged=merged,
        tokens_per_second=round(tokens_per_second, 2),
        eta_seconds=None if eta is None else round(eta, 1),
        attempts=known,
    )


def _attempt(attempt: Attempt, committed: int, newest: bool) -> AttemptStatus:
    beats = list(attempt.heartbeats().values())
    generated = max(sum(int(beat.get("generated_tokens", 0)) for beat in beats), committed)
    return AttemptStatus(
        number=attempt.number,
        where=attempt.where,
        started=float(attempt.claim.get("started", 0.0)),
        ended=attempt.ended,
        live=newest and attempt.ended is None and _beats(attempt, beats),
        ranks=len(beats),
        generated_tokens=generated,
        lost_tokens=generated - committed,
    )


def _beats(attempt: Attempt, beats: list[dict[str, Any]]) -> bool:
    here = attempt.is_here()
    if here is not None:
        return here
    last = max([float(beat.get("time", 0.0)) for beat in beats], default=float(attempt.claim.get("started", 0.0)))
    return time.time() - last < attempt.limit


def _rate(attempt: Attempt, committed: int) -> float:
    """Recorded tokens a second of wall time since the first rank was ready."""
    beats = attempt.heartbeats().values()
    ready = [float(beat["ready"]) for beat in beats if beat.get("ready")]
    if not ready:
        return 0.0
    last = max(float(beat["time"]) for beat in beats)
    return committed / (last - min(ready)) if last > min(ready) else 0.0
