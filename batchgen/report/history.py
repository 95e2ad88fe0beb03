"""The attempts of a run: who worked when, on what, and where the time went."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchgen.checkpoint import Attempt, AttemptStatus, RunFolder, all_heartbeats, attempts
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
    unseen: int  # ranks that ended before they held any, or have left no word
    hosts: Sequence[str]
    job: str  # Slurm's number, or ""
    begin: float
    end: float  # of one that works, now
    live: bool
    outcome: str  # how it ended, in words
    orderly: bool  # it works, or has recorded its end and until then all that it counts
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
        """Of all the GPUs that are recorded of it together; 0 where none is."""
        return sum(self.devices.values()) * self.seconds


def unseen_gpu_seconds(starts: Sequence[Start]) -> float:
    """Of ranks whose GPUs are not recorded: one each, or as many as those of a like attempt had; 0 where none had one.

    A rank says what it holds once its model is there, so one that is killed while it loads never does.
    """
    gpus_per_rank: dict[tuple[str, int], int] = {}  # GPUs a rank, by engine and ranks
    for start in starts:
        if start.devices and not start.unseen:
            gpus_per_rank[start.engine, start.ranks] = max(sum(start.devices.values()) // start.ranks, 1)
    if not any(start.devices for start in starts):
        return 0.0
    return sum(start.unseen * gpus_per_rank.get((start.engine, start.ranks), 1) * start.seconds for start in starts)


def starts(folder: RunFolder, states: Sequence[AttemptStatus], table: Table) -> list[Start]:
    """The attempts as a person wants to see them, oldest first; one of which no file tells the time is left out.

    Args:
        known: what `status` says of each that has a claim.
        table: the recorded batches.
    """
    by_number = {state.number: state for state in states}
    claims, heartbeats = {attempt.number: attempt for attempt in attempts(folder)}, all_heartbeats(folder)
    # Where a claim is gone, its attempt's heartbeats and batches still tell of it.
    numbers = sorted({*claims, *heartbeats, *table["attempt"].tolist()})
    now = time.time()
    order = table[np.argsort(table["attempt"], kind="stable")]
    ends = np.searchsorted(order["attempt"], [[number, number + 1] for number in numbers]).reshape(-1, 2)
    entries = [
        _start(
            claims.get(number, Attempt(folder, number, {})),
            heartbeats.get(number, {}),
            by_number.get(number),
            order[first:last],
            now,
        )
        for number, (first, last) in zip(numbers, ends, strict=True)
    ]
    return [start for start in entries if start is not None]


def _start(
    attempt: Attempt,
    heartbeats: Mapping[int, Mapping[str, Any]],
    state: AttemptStatus | None,
    batches: Table,
    now: float,
) -> Start | None:
    claim = attempt.claim
    live = state is not None and state.live
    begin = _begin(claim, heartbeats, batches)
    if begin is None:
        return None
    seen = [float(heartbeat.get("time", 0.0)) for heartbeat in heartbeats.values()]
    end = now if live else float(claim.get("ended_at") or max([begin, *seen]))
    end = max(end, float(batches["finished"].max(initial=begin)))
    loading, idle = _waits(heartbeats, batches, begin, end)
    hosts = {
        str(claim.get("host", "")): None,
        **{str(heartbeat.get("host", "")): None for heartbeat in heartbeats.values()},
    }
    devices = Counter(str(name) for heartbeat in heartbeats.values() for name in heartbeat.get("devices", ()))
    size, ranks = claim.get("batch_size"), max(len(heartbeats), int(claim.get("ranks", 1)))
    died = "died" if claim else "not known: its claim is damaged or gone"
    return Start(
        number=attempt.number,
        shard=str(attempt.shard),
        engine=str(claim.get("engine", "")),
        model=str(claim.get("model", "")),
        command=[str(word) for word in claim.get("command", ())],
        batch_size=int(size) if isinstance(size, int) else None,
        ranks=ranks,
        devices=devices,
        unseen=ranks - sum(bool(heartbeat.get("ready")) for heartbeat in heartbeats.values()),
        hosts=[host for host in hosts if host],
        job=str(claim.get("job") or ""),
        begin=begin,
        end=end,
        live=live,
        outcome=attempt.ended or ("works" if live else died),
        orderly=live or attempt.ended is not None,
        loading=loading,
        idle=idle,
        rows=int(batches["rows"].sum()),
        failed=int(batches["failed"].sum()),
        generated_tokens=int(batches["generated_tokens"].sum()),
        lost_tokens=0 if state is None or live else state.lost_tokens,
    )


def _begin(claim: Mapping[str, Any], heartbeats: Mapping[int, Mapping[str, Any]], batches: Table) -> float | None:
    """The earliest moment that is known of an attempt: its claim may be damaged, or made again later."""
    moments = [
        claim.get("started"),
        *(heartbeat.get("ready") or heartbeat.get("time") for heartbeat in heartbeats.values()),
    ]
    moments += (batches["finished"] - batches["seconds"]).tolist()
    return min((float(moment) for moment in moments if moment), default=None)


def _waits(
    heartbeats: Mapping[int, Mapping[str, Any]], batches: Table, begin: float, end: float
) -> tuple[float, float]:
    """Rank-seconds of loading, and behind each rank's last recorded batch.

    Only one rank of a stream writes its batches: they count for all of that stream.
    """
    streams = {rank: heartbeat.get("stream", rank) for rank, heartbeat in heartbeats.items()}
    last: dict[object, float] = {}
    for rank in set(batches["rank"].tolist()):
        finished = float(batches["finished"][batches["rank"] == rank].max())
        stream = streams.get(rank, rank)
        last[stream] = max(finished, last.get(stream, 0.0))
    loading = idle = 0.0
    for rank, heartbeat in heartbeats.items():
        ready = min(max(float(heartbeat.get("ready") or end), begin), end)
        loading += ready - begin
        idle += end - min(max(last.get(streams[rank], ready), ready), end)
    return loading, idle
