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
    known: dict[tuple[str, int], int] = {}  # GPUs a rank, by engine and ranks
    for one in starts:
        if one.devices and not one.unseen:
            known[one.engine, one.ranks] = max(sum(one.devices.values()) // one.ranks, 1)
    if not any(one.devices for one in starts):
        return 0.0
    return sum(one.unseen * known.get((one.engine, one.ranks), 1) * one.seconds for one in starts)


def starts(folder: RunFolder, known: Sequence[AttemptStatus], table: Table) -> list[Start]:
    """The attempts as a person wants to see them, oldest first; one of which no file tells the time is left out.

    Args:
        known: what `status` says of each that has a claim.
        table: the recorded batches.
    """
    states = {one.number: one for one in known}
    claims, beats = {one.number: one for one in attempts(folder)}, all_heartbeats(folder)
    # Where a claim is gone, its attempt's heartbeats and batches still tell of it.
    numbers = sorted({*claims, *beats, *table["attempt"].tolist()})
    now = time.time()
    order = table[np.argsort(table["attempt"], kind="stable")]
    ends = np.searchsorted(order["attempt"], [[number, number + 1] for number in numbers]).reshape(-1, 2)
    found = [
        _start(
            claims.get(number, Attempt(folder, number, {})),
            beats.get(number, {}),
            states.get(number),
            order[first:last],
            now,
        )
        for number, (first, last) in zip(numbers, ends, strict=True)
    ]
    return [one for one in found if one is not None]


def _start(
    attempt: Attempt, beats: Mapping[int, Mapping[str, Any]], state: AttemptStatus | None, mine: Table, now: float
) -> Start | None:
    claim = attempt.claim
    live = state is not None and state.live
    begin = _begin(claim, beats, mine)
    if begin is None:
        return None
    seen = [float(beat.get("time", 0.0)) for beat in beats.values()]
    end = now if live else float(claim.get("ended_at") or max([begin, *seen]))
    end = max(end, float(mine["finished"].max(initial=begin)))
    loading, idle = _waits(beats, mine, begin, end)
    hosts = {str(claim.get("host", "")): None, **{str(beat.get("host", "")): None for beat in beats.values()}}
    devices = Counter(str(name) for beat in beats.values() for name in beat.get("devices", ()))
    size, ranks = claim.get("batch_size"), max(len(beats), int(claim.get("ranks", 1)))
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
        unseen=ranks - sum(bool(beat.get("ready")) for beat in beats.values()),
        hosts=[host for host in hosts if host],
        job=str(claim.get("job") or ""),
        begin=begin,
        end=end,
        live=live,
        outcome=attempt.ended or ("works" if live else died),
        orderly=live or attempt.ended is not None,
        loading=loading,
        idle=idle,
        rows=int(mine["rows"].sum()),
        failed=int(mine["failed"].sum()),
        generated_tokens=int(mine["generated_tokens"].sum()),
        lost_tokens=0 if state is None or live else state.lost_tokens,
    )


def _begin(claim: Mapping[str, Any], beats: Mapping[int, Mapping[str, Any]], mine: Table) -> float | None:
    """The earliest moment that is known of an attempt: its claim may be damaged, or made again later."""
    moments = [claim.get("started"), *(beat.get("ready") or beat.get("time") for beat in beats.values())]
    moments += (mine["finished"] - mine["seconds"]).tolist()
    return min((float(one) for one in moments if one), default=None)


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
