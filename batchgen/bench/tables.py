"""A bench's results for people and programs: Markdown, CSV, and the plot of throughput over batch size."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchgen.bench.results import CountMode, Folder, Result
from batchgen.files import write_atomic

_GB = 1e9
_MEMORY = ("device, GB", "host, GB")  # most of one device; most of one rank


def write(folder: Folder, mode: CountMode) -> Path:
    """Writes tables.md, results.csv and, where Matplotlib is installed, throughput.png; the path of the first."""
    results = folder.results()
    text = markdown(folder.known(), results, mode)
    # Others that measure on this host may write theirs at the same time.
    write_atomic(folder.path / "tables.md", text.encode())
    write_atomic(folder.path / "results.csv", _csv(results, mode).encode())
    write_atomic(folder.path / "throughput.png", _plot(results, mode))
    return folder.path / "tables.md"


def markdown(known: dict[str, Any], results: Sequence[Result], mode: CountMode) -> str:
    """The tables: load seconds, milliseconds a token over batch sizes, what each cell is made of, and the job."""
    asked = known["asked"]
    random = asked["model"].startswith("random weights")
    counted = (
        "as the seed counts (padding behind a row's end is generated)" if mode == "seed" else "each row to its end"
    )
    parts = [
        f"{asked['model']}, {asked['dtype']}, {asked['tokens']} new tokens, median of {asked['cycles']} cycles; tokens "
        f"{counted}. {_machine(known)}",
        _loads(results) + ("\n\nRandom weights are made, not read: loading real ones takes longer." if random else ""),
    ]
    seeds = [result for result in results if result.job == "seed"]
    systems = list(dict.fromkeys((result.system, result.ranks) for result in seeds))
    seeds.sort(key=lambda one: (systems.index((one.system, one.ranks)), one.batch or 0))
    if seeds:
        parts += ["Milliseconds per token by batch size:", _milliseconds(seeds, mode), _details(seeds, mode)]
    jobs = [result for result in results if result.job != "seed"]
    if jobs:
        parts += ["Jobs of unequal lengths:", _jobs(jobs, mode)]
    scaling = _scaling([*seeds, *jobs], mode)
    if scaling is not None:
        parts += ["Tokens a second by number of ranks, in those of the fewest; a batch is that of a stream:", scaling]
    return "\n\n".join(parts) + "\n"


def _machine(known: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items())
    machine = known.get("machine")
    measured = ""
    if machine is not None:
        speed = f"{machine['bytes_per_second'] / 1e9:,.0f} GB/s, {machine['operations_per_second'] / 1e12:,.2f} TFLOP/s"
        measured = f"{machine['name']}, measured: {speed}. "
    typed = "".join(f"\n    {command}" for command in known.get("commands", []))
    return f"{measured}{known.get('date', '')}; {versions}." + (f"\n\nMeasured by\n{typed}" if typed else "")


def _loads(results: Sequence[Result]) -> str:
    rows: dict[tuple[str, int], float] = {}
    for result in results:
        if result.load_seconds is not None:
            rows.setdefault((result.system, result.ranks), result.load_seconds)
    return table(
        ["system", "ranks", "seconds until ready"], [[*key, f"{seconds:.1f}"] for key, seconds in rows.items()]
    )


def _milliseconds(results: Sequence[Result], mode: CountMode) -> str:
    batches = sorted({result.batch for result in results if result.batch is not None})
    lines = []
    for system, ranks in dict.fromkeys((result.system, result.ranks) for result in results):
        cells = {one.batch: one for one in results if (one.system, one.ranks) == (system, ranks)}
        lines.append([system, ranks, *(_cell(cells[batch], mode) if batch in cells else "" for batch in batches)])
    return table(["system", "ranks", *batches], lines)


def _cell(result: Result, mode: CountMode) -> str:
    return f"{result.milliseconds(mode):.3f}" if result.outcome == "ok" else result.outcome


def _details(results: Sequence[Result], mode: CountMode) -> str:
    lines = []
    for one in results:
        if one.outcome != "ok" or one.prefill_seconds is None:
            continue
        share = "" if one.floor_seconds is None else f"{one.floor_seconds / one.median:.0%}"
        lines.append(
            [
                one.system,
                one.ranks,
                _batch(one),
                f"{one.per_second(mode):,.0f}",
                f"{1000 * one.prefill_seconds:.1f}",
                f"{1000 * one.step_seconds:.2f}",
                share,
                _gigabytes(one.device_bytes),
                _gigabytes(one.host_bytes),
            ]
        )
    header = [
        "system",
        "ranks",
        "batch",
        "tokens/s",
        "prefill, ms",
        "decode step, ms",
        "of the floor",
        "device, GB",
        "host, GB",
    ]
    return table(header, lines)


def _batch(result: Result) -> str:
    """Rows of a stream: a continuous engine may have had fewer of them in work, and is timed all the same."""
    whole = result.batch is None or result.fits is None or result.fits >= result.batch
    return f"{result.batch}" if whole else f"{result.batch} ({result.fits} at once)"


def _jobs(results: Sequence[Result], mode: CountMode) -> str:
    lines = []
    for one in results:
        if one.outcome == "ok":
            numbers = [one.rows, f"{one.tokens(mode):,}", f"{one.median:.1f}", f"{one.per_second(mode):,.0f}", one.fits]
            lines.append(
                [one.system, one.ranks, one.job, *numbers, _gigabytes(one.device_bytes), _gigabytes(one.host_bytes)]
            )
        else:
            lines.append([one.system, one.ranks, one.job, one.outcome, *[""] * 6])
    header = [
        "system",
        "ranks",
        "job",
        "rows",
        "tokens",
        "seconds",
        "tokens/s",
        "largest batch",
        "device, GB",
        "host, GB",
    ]
    return table(header, lines)


def _scaling(results: Sequence[Result], mode: CountMode) -> str | None:
    """What more ranks bring, of each cell that several numbers of ranks have; None: there is no such cell."""
    speeds: dict[tuple[str, str, int | None], dict[int, float]] = {}
    for one in results:
        if one.outcome == "ok":
            speeds.setdefault((one.system, one.job, one.batch), {})[one.ranks] = one.per_second(mode)
    speeds = {cell: by_ranks for cell, by_ranks in speeds.items() if len(by_ranks) > 1}
    counts = sorted({ranks for by_ranks in speeds.values() for ranks in by_ranks})
    lines = [
        [system, job, batch or "", *(f"{speed[n] / speed[min(speed)]:.2f}" if n in speed else "" for n in counts)]
        for (system, job, batch), speed in speeds.items()
    ]
    return table(["system", "job", "batch", *counts], lines) if lines else None


def _gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / _GB:.1f}"


def table(header: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    """A table in Markdown, numbers to the right."""
    rows = [header, ["--:" if number else "---" for number in range(len(header))], *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _csv(results: Sequence[Result], mode: CountMode) -> str:
    text = io.StringIO()
    names = ("system", "ranks", "job", "batch", "outcome", "fits", "rows", "load_seconds", "prefill_seconds")
    sizes = ("floor_seconds", "device_bytes", "host_bytes")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "seconds", "tokens", "tokens_per_second", "ms_per_token", *sizes])
    for one in results:
        measured = ["", "", "", ""]
        if one.outcome == "ok":
            measured = [
                f"{one.median:.6f}",
                str(one.tokens(mode)),
                f"{one.per_second(mode):.3f}",
                f"{one.milliseconds(mode):.6f}",
            ]
        writer.writerow([*(getattr(one, name) for name in names), *measured, *(getattr(one, name) for name in sizes)])
    return text.getvalue()


def _plot(results: Sequence[Result], mode: CountMode) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for system, ranks in dict.fromkeys((one.system, one.ranks) for one in results if one.job == "seed"):
        mine = [one for one in results if (one.system, one.ranks, one.job) == (system, ranks, "seed")]
        good = sorted((one.batch or 0, one.per_second(mode)) for one in mine if one.outcome == "ok")
        label = system if ranks == 1 else f"{system}, {ranks} ranks"
        axes.plot([batch for batch, _ in good], [speed for _, speed in good], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="batch, rows of a stream", ylabel="tokens a second")
    batches = sorted({one.batch for one in results if one.batch is not None})
    axes.set_xticks(batches, labels=list(map(str, batches)))
    axes.set_xticks([], minor=True)
    axes.grid(visible=True, which="both", alpha=0.3)
    if axes.lines:
        axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150)
    return drawn.getvalue()


def compare(one: Folder, other: Folder, mode: CountMode) -> str:
    """The cells that both have: tokens a second, and how many times faster the other is."""
    mine = {result.key: result for result in one.results()}
    lines = []
    for result in other.results():
        known = mine.get(result.key)
        if known is None:
            continue
        cells = [_speed(known, mode), _speed(result, mode)]
        both = known.outcome == result.outcome == "ok"
        ratio = f"{result.per_second(mode) / known.per_second(mode):.2f}" if both else ""
        lines.append([result.system, result.ranks, result.job, result.batch or "", *cells, ratio])
    return table(["system", "ranks", "job", "batch", f"{one.path}", f"{other.path}", "ratio"], lines)


def _speed(result: Result, mode: CountMode) -> str:
    return f"{result.per_second(mode):,.1f}" if result.outcome == "ok" else result.outcome
