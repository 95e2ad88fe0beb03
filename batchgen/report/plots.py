"""What the report draws: speed, latency, lengths, padding, errors and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from batchgen.report.batches import Clock, Floats, Speed, Table, band
from batchgen.report.drawing import (
    BLUE,
    INK,
    LINE,
    ORANGE,
    PAPER,
    RED,
    SERIES,
    SHORT,
    SOFT,
    TEAL,
    Plot,
    axes,
    finished,
    plain_numbers,
    rows_of_bars,
    style,
)
from batchgen.report.history import Start
from batchgen.report.rows import Rows
from batchgen.report.words import counted, duration, percent, plural, rate, size_of

NAMES = ("tokens-per-second", "batch-latency", "lengths", "padding", "memory", "errors")
"""Of all plots there may be, in the order of the page."""

_DOTS = 2000  # batches up to which each is a dot of its own
_FEW = 60  # and up to which each is a dot on its line
_LINES = 6  # ranks up to which each has a line
_BARS = 12
_BEHIND = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5, "alpha": 0.85}  # so that a line does not cross a text
_UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60))


def draw(table: Table, clock: Clock, speed: Speed, starts: Sequence[Start], rows: Rows) -> Iterator[Plot]:
    """The plots there is something to draw for, in the order of the page."""
    with style():
        if speed.peak:
            yield _speed(clock, speed, starts)
        if len(table):
            yield _latency(table, clock)
        if any(not failed for failed in rows.failed):
            yield _lengths(rows)
        if table["prompt_tokens"].any():
            yield _padding(table, starts)
        if not np.isnan(table["peak_memory"]).all():
            yield _memory(table, clock)
        if rows.kinds:
            yield _errors(rows)


def _write(drawn: Axes, x: float, y: float, text: str, offset: tuple[float, float], **look: Any) -> None:
    """Puts `text` beside a point; `offset` is in points."""
    drawn.annotate(text, (x, y), xytext=offset, textcoords="offset points", **look)


def _time_axis(drawn: Axes, clock: Clock) -> None:
    """Names the unit of the time axis, and shows where pauses are cut out of it."""
    unit, scale = next(((name, size) for name, size in _UNITS if clock.end > 2 * size), ("seconds", 1))
    drawn.xaxis.set_major_formatter(lambda value, _: f"{value / scale:g}")
    step = _step(clock.end / scale / (8 if drawn.get_position().width > 0.5 else 5)) * scale
    drawn.set_xticks(np.arange(0, clock.end * 1.0001, step))
    drawn.set_xlim(0, clock.end or 1)
    drawn.set_xlabel(f"{unit} of work since the first start")
    for left, right, _ in clock.pauses:
        drawn.axvspan(left, right, color=LINE, linewidth=0)


def _step(least: float) -> float:
    size = 10.0 ** np.floor(np.log10(max(least, 1e-9)))
    return float(next(step * size for step in (1, 2, 5, 10) if step * size >= least * 0.999))


def _speed(clock: Clock, speed: Speed, starts: Sequence[Start]) -> Plot:
    (drawn,) = axes(wide=True, height=2.9)
    drawn.fill_between(speed.at, speed.rate, color=BLUE, alpha=0.14, linewidth=0)
    drawn.plot(speed.at, speed.rate, color=BLUE)
    drawn.axhline(speed.median, color=ORANGE, linewidth=1, linestyle=(0, (4, 3)))
    top = speed.peak * 1.22 or 1.0
    drawn.set_ylim(0, top)
    _write(
        drawn, clock.end, speed.median, f"median {rate(speed.median)}", (-2, 4), color=ORANGE, ha="right", bbox=_BEHIND
    )
    _mark_starts(drawn, clock, starts, top)
    drawn.set_ylabel("generated tokens a second")
    drawn.yaxis.set_major_formatter(SHORT)
    _time_axis(drawn, clock)
    caption = (
        f"All ranks together, in steps of {duration(speed.width)}: median {rate(speed.median)}, peak "
        f"{rate(speed.peak)} tokens a second, over {plural(len(starts), 'attempt')}."
    )
    if len(starts) > 1:
        caption += " Dotted: where an attempt begins, with its number."
    if clock.pauses:
        waited = sum(seconds for _, _, seconds in clock.pauses)
        caption += f" Grey: nothing worked, {duration(waited)} in all; a long pause is drawn short."
    return finished("tokens-per-second", "Tokens per second", caption, drawn)


def _mark_starts(drawn: Axes, clock: Clock, starts: Sequence[Start], top: float) -> None:
    """A line at each start, and its number where there is room for it; of starts at the same time, the first one's."""
    if len(starts) == 1:
        return
    last = -np.inf
    for start, at in zip(starts, clock.at(np.array([start.begin for start in starts])), strict=True):
        if len(starts) <= 200:
            drawn.axvline(at, color=SOFT, linewidth=0.8, linestyle=(0, (1, 2)))
        if at - last >= 0.007 * clock.end * (1 + len(str(start.number))):
            _write(drawn, float(at), top, str(start.number), (3, -2), color=SOFT, va="top")
            last = float(at)


def _latency(table: Table, clock: Clock) -> Plot:
    over, spread = axes(2, height=2.7, widths=[2.4, 1])
    at, seconds = clock.at(table["finished"]), table["seconds"]
    if len(table) <= _DOTS:
        size = 9 if len(table) > 200 else 18
        over.scatter(at, seconds, s=size, color=BLUE, alpha=0.55, linewidths=0, clip_on=False)
    else:
        quantiles = band(at, seconds)
        over.fill_between(quantiles.at, quantiles.low, quantiles.high, color=BLUE, alpha=0.25, linewidth=0)
        over.plot(quantiles.at, quantiles.middle, color=BLUE)
        over.scatter(quantiles.at, quantiles.highest, s=5, color=SOFT, linewidths=0)
    longest = float(seconds.max(initial=0.0))
    spread.hist(
        seconds, bins=_bins(seconds, min(30, 8 + len(seconds) // 10)), color=BLUE, orientation="horizontal", alpha=0.8
    )
    for plot in (over, spread):
        if _wide_range(seconds):
            plot.set_yscale("log")
            plain_numbers(plot.yaxis)
        else:
            plot.set_ylim(0, longest * 1.05 or 1)
    over.set_ylabel("seconds a batch")
    spread.set_xlabel("batches")
    spread.tick_params(labelleft=False)
    spread.xaxis.set_major_formatter(SHORT)
    spread.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    _time_axis(over, clock)
    low, high, worst = np.quantile(seconds, [0.5, 0.95, 1.0])
    caption = (
        f"{plural(len(table), 'batch', 'batches')}: median {duration(low)}, 95 of 100 within {duration(high)}, the "
        f"longest {duration(worst)}. An engine that finishes rows one by one counts from one record to the next."
    )
    if len(table) > _DOTS:
        caption += " Line: median; band: 10th to 90th percentile; dots: the longest of each step."
    return finished("batch-latency", "Batch latency", caption, over)


def _wide_range(values: Floats) -> bool:
    """Whether a few values are so far from most that only a logarithm shows both."""
    there = values[values > 0]
    return bool(len(there)) and float(there.max()) > 20 * float(np.median(there))


def _bins(values: Floats, count: int) -> list[float]:
    low, high = float(values.min(initial=np.inf)), float(values.max(initial=0.0))
    if _wide_range(values):
        return list(np.geomspace(max(float(values[values > 0].min()), 1e-6), high, count + 1))
    room = 0.0 if high > low else 0.1 * high or 1.0  # of one value alone, for the bar to be seen
    return list(np.linspace(0.0 if low < high / 3 else low - room, high + room, count + 1))


def _whole_bins(values: Floats, count: int) -> list[float]:
    """As `_bins`, for whole numbers: as many of them in each bin, or some would stand out for that alone."""
    if _wide_range(values):
        return _bins(values, count)
    low, high = float(values.min()), float(values.max())
    step = max(np.ceil((high - low + 1) / count), 1.0)
    return list(np.arange(low - 0.5, high + step, step))


def _lengths(rows: Rows) -> Plot:
    good = ~np.array(rows.failed)
    both = axes(2, height=2.7)
    parts = []
    for drawn, name, lengths, colour in zip(
        both, ("prompt", "output"), (rows.prompt_tokens, rows.generated_tokens), (TEAL, BLUE), strict=True
    ):
        values = np.array(lengths, dtype=np.float64)[good]
        drawn.hist(values, bins=_whole_bins(values, min(40, 8 + len(values) // 10)), color=colour, alpha=0.85)
        if _wide_range(values):
            drawn.set_xscale("log")
            plain_numbers(drawn.xaxis)
        else:
            drawn.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if np.ptp(values) < 4:
                drawn.set_xlim(values.min() - 2.5, values.max() + 2.5)
        middle, high, longest = np.quantile(values, [0.5, 0.95, 1.0])
        drawn.axvline(middle, color=INK, linewidth=1)
        drawn.set_title(f"{name}: median {middle:,.0f}, longest {longest:,.0f}")
        drawn.set_xlabel(f"tokens of the {name}")
        drawn.xaxis.set_major_formatter(SHORT)
        drawn.yaxis.set_major_formatter(SHORT)
        drawn.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        parts.append(f"{name}s have {middle:,.0f} tokens in the middle, {high:,.0f} at the 95th percentile")
    both[0].set_ylabel("rows")
    cut = sum(ending == "length" for ending in rows.endings)
    share = percent(cut, int(good.sum()))
    which = "good rows" if int(good.sum()) == rows.good else f"sampled good rows of {counted(rows.good)}"
    caption = f"Of {counted(int(good.sum()))} {which}, {'; '.join(parts)}. {share} ended at their limit of new tokens."
    return finished("lengths", "Lengths", caption, both[0])


def _padding(table: Table, starts: Sequence[Start]) -> Plot:
    """Real and padded token positions, an attempt or, where there are many, an engine a bar."""
    labels: dict[str, Table] = {}
    names = {start.number: f"attempt {start.number}, {start.engine or '?'}" for start in starts}
    if len(names) > _BARS:
        names = {start.number: start.engine for start in starts}
    for label in dict.fromkeys(names.values()):
        batches = table[np.isin(table["attempt"], [number for number, name in names.items() if name == label])]
        if len(batches):
            labels[label] = batches
    (drawn,) = axes(height=max(2.0, 0.75 + 0.28 * len(labels)))
    parts = (
        ("prompt", "prompt_tokens", TEAL),
        ("generated", "generated_tokens", BLUE),
        ("padding", "padded_tokens", ORANGE),
    )
    stacked = np.zeros(len(labels))
    for name, field, colour in parts:
        values = np.array([batches[field].sum() for batches in labels.values()], dtype=np.float64)
        drawn.barh(list(labels), values, left=stacked, color=colour, label=name, height=0.62)
        stacked = stacked + values
    for at, batches in enumerate(labels.values()):
        share = percent(batches["padded_tokens"].sum(), stacked[at])
        _write(drawn, stacked[at], at, f"{share} padding", (6, 0), color=SOFT, va="center")
    drawn.set_xlim(0, stacked.max() * 1.3 or 1)
    rows_of_bars(drawn, len(labels))
    drawn.xaxis.set_major_formatter(SHORT)
    drawn.set_xlabel("token positions computed")
    drawn.figure.legend(loc="outside upper right", ncols=3, handlelength=1, handleheight=0.8)
    padded, real = int(table["padded_tokens"].sum()), int((table["prompt_tokens"] + table["generated_tokens"]).sum())
    caption = f"{counted(padded)} of {counted(padded + real)} positions were padding, {percent(padded, padded + real)}."
    if not padded:
        caption = f"None of {counted(real)} positions was padding."
    return finished("padding", "Padding", caption, drawn)


def _memory(table: Table, clock: Clock) -> Plot:
    (drawn,) = axes(height=2.7)
    there = table[~np.isnan(table["peak_memory"])]
    ranks = sorted(set(there["rank"].tolist()))
    if len(ranks) <= _LINES:
        for rank, colour in zip(ranks, SERIES, strict=False):
            batches = there[there["rank"] == rank]
            at, values = clock.at(batches["finished"]), batches["peak_memory"]
            if len(batches) > _DOTS:
                spread = band(at, values, 300)
                at, values = spread.at, spread.highest
            breaks = np.searchsorted(at, [begin for begin, _, _ in clock.pauses], side="right")
            at, values = np.insert(at, breaks, np.nan), np.insert(values, breaks, np.nan)
            size = 3 if len(batches) <= _FEW else 0  # no line shows one point alone
            look: Any = {"markersize": size, "clip_on": False}
            drawn.plot(at, values / 1e9, "o-", color=colour, label=f"rank {rank}", drawstyle="steps-pre", **look)
    else:
        spread = band(clock.at(there["finished"]), there["peak_memory"])
        drawn.fill_between(spread.at, spread.low / 1e9, spread.highest / 1e9, color=BLUE, alpha=0.25, linewidth=0)
        drawn.plot(spread.at, spread.middle / 1e9, color=BLUE, label=f"median of {len(ranks)} ranks")
    drawn.set_ylim(0, float(there["peak_memory"].max()) * 1.15 / 1e9)
    drawn.set_ylabel("GB at the peak of a batch")
    drawn.figure.legend(loc="outside upper right", ncols=3, handlelength=1.2)
    _time_axis(drawn, clock)
    where = int(np.argmax(there["peak_memory"]))
    caption = (
        f"Of the device, or without one of the process. The most: {size_of(there['peak_memory'][where])}, on rank "
        f"{there['rank'][where]} in attempt {there['attempt'][where]}."
    )
    if len(ranks) > _LINES:
        caption += " Band: from the 10th percentile of the ranks' batches to the most."
    return finished("memory", "Peak memory", caption, drawn)


def _errors(rows: Rows) -> Plot:
    kinds = rows.kinds[:_BARS]
    (drawn,) = axes(height=max(1.5, 0.6 + 0.3 * len(kinds)))
    counts = [kind.count for kind in kinds]
    drawn.barh([kind.type for kind in kinds], counts, color=RED, height=0.62)
    for at, count in enumerate(counts):
        _write(drawn, count, at, f"{count:,}", (6, 0), va="center")
    drawn.set_xlim(0, max(counts) * 1.18)
    rows_of_bars(drawn, len(kinds))
    drawn.xaxis.set_major_formatter(SHORT)
    drawn.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    drawn.set_xlabel("rows")
    total = sum(kind.count for kind in rows.kinds)
    caption = f"{plural(total, 'row')} failed, of {plural(len(rows.kinds), 'kind')}; most are {kinds[0].type}."
    return finished("errors", "Errors", caption, drawn)
