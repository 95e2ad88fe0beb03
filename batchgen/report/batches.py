"""Every recorded batch of a run as one table, and what it says over time: speed, latency, memory, padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchgen.checkpoint import RunFolder

Floats = NDArray[np.float64]
Table = NDArray[Any]
"""One entry a batch, by the time it was finished; its fields are those of `_FIELDS`."""

_FIELDS = [
    ("finished", "f8"),  # Unix time
    ("seconds", "f8"),
    ("rows", "i8"),
    ("failed", "i8"),
    ("prompt_tokens", "i8"),
    ("generated_tokens", "i8"),
    ("padded_tokens", "i8"),
    ("peak_memory", "f8"),  # bytes; not a number where nobody has measured it
    ("attempt", "i8"),
    ("rank", "i8"),
    ("file", "i8"),  # of its generations: a number into `Batches.files`
    ("begin", "i8"),  # of its first line in that file, in bytes
]


@dataclass(frozen=True)
class Batches:
    """The recorded batches of a run."""

    table: Table
    files: list[Path]

    @classmethod
    def read(cls, folder: RunFolder) -> Batches:
        """All that is recorded now; some 100 bytes a batch."""
        files: list[Path] = []
        table = np.fromiter(_entries(folder, files), dtype=_FIELDS)
        return cls(table[np.argsort(table["finished"], kind="stable")], files)

    def seconds_of(self, path: Path, begins: Sequence[int]) -> Floats:
        """Seconds of the batch that holds the line at each of `begins` in the generations file `path`."""
        in_file = self.table[self.table["file"] == self.files.index(path)] if path in self.files else self.table[:0]
        if not len(in_file):
            return np.full(len(begins), np.nan)
        in_file = in_file[np.argsort(in_file["begin"])]
        where = np.searchsorted(in_file["begin"], np.asarray(begins), side="right") - 1
        seconds: Floats = in_file["seconds"][np.maximum(where, 0)]
        return seconds


def _entries(folder: RunFolder, files: list[Path]) -> Iterator[tuple[object, ...]]:
    for path, record in folder.records(verify=False):
        if not files or files[-1] != path:
            files.append(path)
        yield (
            record.finished,
            record.seconds,
            record.prompts,
            len(record.failed),
            record.prompt_tokens,
            record.generated_tokens,
            record.padded_tokens,
            np.nan if record.peak_memory_bytes is None else record.peak_memory_bytes,
            record.attempt,
            record.rank,
            len(files) - 1,
            record.begin,
        )


_GAP = 0.03  # of the working time: a longer pause is cut to this, or a night in the queue would squeeze all the rest


@dataclass(frozen=True)
class Clock:
    """Time as the plots show it: seconds since the first start, long pauses between attempts cut short."""

    spans: list[tuple[float, float]]  # Unix times between which something worked, in order, apart from each other
    starts: list[float]  # where each begins on the axis

    @classmethod
    def of(cls, intervals: Sequence[tuple[float, float]]) -> Clock:
        """The clock of attempts that worked in `intervals` (Unix times), which may overlap."""
        spans: list[tuple[float, float]] = []
        for begin, end in sorted(intervals):
            if spans and begin <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(spans[-1][1], end))
            else:
                spans.append((begin, end))
        longest_pause = _GAP * sum(end - begin for begin, end in spans)
        starts: list[float] = []
        for number, (begin, _) in enumerate(spans):
            before = 0.0
            if number:
                last = spans[number - 1]
                before = starts[-1] + last[1] - last[0] + min(begin - last[1], longest_pause)
            starts.append(before)
        return cls(spans, starts)

    def at(self, times: Floats) -> Floats:
        """Unix times as places on the axis; one inside a pause is its begin. Zeros where nothing worked."""
        if not self.spans:
            return np.zeros(len(times))
        begins = np.array([begin for begin, _ in self.spans])
        lengths = np.array([end - begin for begin, end in self.spans])
        number = np.maximum(np.searchsorted(begins, times, side="right") - 1, 0)
        inside = np.clip(times - begins[number], 0.0, lengths[number])
        return np.asarray(np.array(self.starts)[number] + inside, dtype=np.float64)

    @property
    def pauses(self) -> list[tuple[float, float, float]]:
        """Begin and end of each pause on the axis, and its real seconds."""
        pauses = []
        for number, ((_, end), (begin, _)) in enumerate(zip(self.spans, self.spans[1:], strict=False)):
            begin_on_axis = self.starts[number] + self.spans[number][1] - self.spans[number][0]
            pauses.append((begin_on_axis, self.starts[number + 1], begin - end))
        return pauses

    @property
    def worked(self) -> float:
        """Seconds in which something worked."""
        return sum(end - begin for begin, end in self.spans)

    @property
    def end(self) -> float:
        """Where the axis ends."""
        return self.starts[-1] + self.spans[-1][1] - self.spans[-1][0] if self.spans else 0.0


@dataclass(frozen=True)
class Speed:
    """Generated tokens a second over time, of all ranks together."""

    at: Floats  # seconds on the clock's axis; not a number between spans, where the line is broken
    rate: Floats
    width: float  # seconds of one step

    @property
    def median(self) -> float:
        """While something was generated."""
        works = self.rate[self.rate > 0]
        return float(np.median(works)) if len(works) else 0.0

    @property
    def peak(self) -> float:
        """The fastest step."""
        return float(np.nanmax(self.rate, initial=0.0))


def speed(table: Table, clock: Clock, steps: int = 300) -> Speed:
    """Tokens a second in about `steps` equal steps; the tokens of a batch are spread evenly over its seconds."""
    ends, lengths = table["finished"], np.maximum(table["seconds"], 1e-6)
    rates = table["generated_tokens"] / lengths
    begins, generates = ends - lengths, rates > 0
    rising, falling = _Ramp(begins, rates), _Ramp(ends, rates)
    first, last = np.sort(begins[generates]), np.sort(ends[generates])
    width = max(clock.worked / steps, min(0.1, clock.worked / 20), 1e-3)
    at: list[Floats] = [np.empty(0)]
    rate: list[Floats] = [np.empty(0)]
    for (begin, end), start in zip(clock.spans, clock.starts, strict=True):
        count = max(round((end - begin) / width), 2)
        edges = np.linspace(begin, end, count + 1)
        tokens = rising(edges) - falling(edges)
        step = max((end - begin) / count, 1e-6)
        at += [np.asarray(start + (np.arange(count) + 0.5) * step, np.float64), np.array([np.nan])]
        # The ramps are sums of all batches, so their difference leaves residue where none is at work.
        works = np.searchsorted(first, edges[1:]) > np.searchsorted(last, edges[:-1], side="right")
        change: Floats = np.where(works, np.maximum(np.diff(tokens), 0.0), 0.0)
        rate += [np.divide(change, step, dtype=np.float64), np.array([np.nan])]
    return Speed(np.concatenate(at), np.concatenate(rate), width)


class _Ramp:
    """The sum of r * max(t - a, 0) over many (a, r), for any t."""

    def __init__(self, at: Floats, rates: Floats) -> None:
        order = np.argsort(at)
        origin = float(at[order[0]]) if len(at) else 0.0
        self._origin, self._at = origin, at[order] - origin
        self._rate = np.concatenate([[0.0], np.cumsum(rates[order])])
        self._offset = np.concatenate([[0.0], np.cumsum(rates[order] * self._at)])

    def __call__(self, times: Floats) -> Floats:
        moved = times - self._origin
        number = np.searchsorted(self._at, moved, side="right")
        return np.asarray(self._rate[number] * moved - self._offset[number], dtype=np.float64)


@dataclass(frozen=True)
class Band:
    """Many values over time, as quantiles of equal steps."""

    at: Floats
    low: Floats  # the tenth part is below
    middle: Floats
    high: Floats  # the tenth part is above
    highest: Floats


def band(at: Floats, values: Floats, steps: int = 120) -> Band:
    """Quantiles of `values` in up to `steps` equal steps of `at`; steps without a value are left out."""
    edges = np.linspace(at.min(), at.max(), steps + 1)
    number = np.clip(np.searchsorted(edges, at, side="right") - 1, 0, steps - 1)
    order = np.argsort(number, kind="stable")
    groups = np.split(values[order], np.searchsorted(number[order], np.arange(1, steps)))
    there = np.array([len(group) > 0 for group in groups])
    quantiles = np.array([np.quantile(group, [0.1, 0.5, 0.9, 1.0]) for group in groups if len(group)])
    middles = (edges[:-1] + edges[1:]) / 2
    return Band(middles[there], quantiles[:, 0], quantiles[:, 1], quantiles[:, 2], quantiles[:, 3])
