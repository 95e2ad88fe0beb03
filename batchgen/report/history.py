"""The attempts of a run: who worked when, on what, and where the time went."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchgen.checkpoint import Attempt, AttemptStatus
from batchgen.report.batches import Table


@dataclass(frozen=True)
class Start:
    """One attempt; times are Unix times."""

    number: int
    shard: str  # like 3/8; 0/1 is all rows
    engine: str
    model: str
    command: Sequence[str]
    batch_size: int | None
    ranks: int
    devices: Mapping[str, int]  # how many GPUs of each kind its ranks hold; none: a CPU, or not recorded
    hosts: Sequence[str]
    job: str  # Slurm's number, or ""
    begin: float
    end: float  # of one that works, now
    live: bool
    outcome: str  # how it ended, in words
    loading: float  # rank-seconds until each was ready
    idle: float  # rank-seconds behind the last recorded batch of each
    rows: int  # recorded, the failed ones included
    failed: int
    generated_tokens: int  # recorded
    lost_tokens: int

    @property
    def seconds(self) -> float:
        """From its start to its end."""
        return max(self.end - self.begin, 0.0)

    @property
    def rank_seconds(self) -> float:
        """Of all its ranks together."""
        return self.ranks * self.seconds

    @property
    def gpu_seconds(self) -> float:
        """Of all its GPUs together; 0 where none is recorded."""
        return sum(self.devices.values()) * self.seconds


def starts(
    attempts: Sequence[Attempt],
    beats: Mapping[int, Mapping[int, Mapping[str, Any]]],
    known: Sequence[AttemptStatus],
    table: Table,
) -> list[Start]:
    """The attempts as a person wants to see them.

    Args:
        attempts: all of them, oldest first.
        beats: the last heartbeat of each of their ranks, by the attempt's number.
        known: what `status` says of each, by its number.
        table: the recorded batches.
    """
    states = {one.number: one for one in known}
    now = time.time()
    order = table[np.argsort(table["attempt"], kind="stable")]
    ends = np.searchsorted(order["attempt"], [[one.number, one.number + 1] for one in attempts]).reshape(-1, 2)
    return [
        _start(one, beats.get(one.number, {}), states.get(one.number), order[first:last], now)
        for one, (first, last) in zip(attempts, ends, strict=True)
    ]


def _start(
    attempt: Attempt, beats: Mapping[int, Mapping[str, Any]], state: AttemptStatus | None, mine: Table, now: float
) -> Start:
    claim = attempt.claim
    live = state is not None and state.live
    begin = float(claim.get("started", 0.0))
    seen = [float(beat.get("time", 0.0)) for beat in beats.values()]
    end = now if live else float(claim.get("ended_at") or max([begin, *seen]))
    end = max(end, float(mine["finished"].max(initial=begin)))
    loading, idle = _waits(beats, mine, begin, end)
    hosts = {str(claim.get("host", "")): None, **{str(beat.get("host", "")): None for beat in beats.values()}}
    devices = Counter(str(name) for beat in beats.values() for name in beat.get("devices", ()))
    size = claim.get("batch_size")
    return Start(
        number=attempt.number,
        shard=str(attempt.shard),
        engine=str(claim.get("engine", "")),
        model=str(claim.get("model", "")),
        command=[str(word) for word in claim.get("command", ())],
        batch_size=int(size) if isinstance(size, int) else None,
        ranks=max(len(beats), int(claim.get("ranks", 1))),
        devices=devices,
        hosts=[host for host in hosts if host],
        job=str(claim.get("job") or ""),
        begin=begin,
        end=end,
        live=live,
        outcome=attempt.ended or ("works" if live else "died"),
        loading=loading,
        idle=idle,
        rows=int(mine["rows"].sum()),
        failed=int(mine["failed"].sum()),
        generated_tokens=int(mine["generated_tokens"].sum()),
        lost_tokens=0 if state is None or live else state.lost_tokens,
    )


def _waits(beats: Mapping[int, Mapping[str, Any]], mine: Table, begin: float, end: float) -> tuple[float, float]:
    """Rank-seconds of loading, and behind each rank's last recorded batch.

    Only one rank of a stream writes its batches: they count for all of that stream.
    """
    streams = {rank: beat.get("stream", rank) for rank, beat in beats.items()}
    last: dict[object, float] = {}
    for rank in set(mine["rank"].tolist()):
        finished = float(mine["finished"][mine["rank"] == rank].max())
        stream = streams.get(rank, rank)
        last[stream] = max(finished, last.get(stream, 0.0))
    loading = idle = 0.0
    for rank, beat in beats.items():
        ready = min(max(float(beat.get("ready") or end), begin), end)
        loading += ready - begin
        idle += end - min(max(last.get(streams[rank], ready), ready), end)
    return loading, idle
