"""A bench's results for people and programs: Markdown, CSV, and the plot of throughput over batch size."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchgen.bench.results import ARTICLE, ARTICLE_JOB, CountMode, Folder, Result
from batchgen.files import write_atomic

_GB = 1e9
_MEMORY = ("device, GB", "host, GB")  # most of one device; most of one rank


def write(folder: Folder, mode: CountMode) -> Path:
    """Writes tables.md, results.csv and, where Matplotlib is installed, throughput.png; the path of the first."""
    results = folder.results()
    text = markdown(folder.read_manifest(), results, mode)
    # Others that measure on this host may write theirs at the same time.
    for name, content in (("tables.md", text), ("results.csv", _csv(results, mode))):
        # The name of a model or an input need not be UTF-8.
        write_atomic(folder.path / name, content.encode(errors="backslashreplace"))
    write_atomic(folder.path / "throughput.png", _plot(results, mode))
    return folder.path / "tables.md"


def markdown(manifest: dict[str, Any], results: Sequence[Result], mode: CountMode) -> str:
    """The tables: load seconds, milliseconds a token over batch sizes, what each cell is made of, and the job."""
    identity = manifest["asked"]
    random = identity["model"].startswith("random weights")
    counted = (
        "as the article counts (padding behind a row's end is generated)" if mode == "seed" else "each row to its end"
    )
    parts = [
        f"{identity['model']}{_size(manifest)}, {identity['dtype']}, {identity['tokens']} new tokens, "
        f"median of {identity['cycles']} cycles; tokens {counted}. {_machine(manifest)}",
        _loads(results) + ("\n\nRandom weights are made, not read: loading real ones takes longer." if random else ""),
    ]
    cells = [result for result in results if result.job == ARTICLE_JOB]
    systems = list(dict.fromkeys((result.system, result.ranks) for result in cells))
    cells.sort(key=lambda result: (systems.index((result.system, result.ranks)), result.batch or 0))
    if cells:
        parts += [
            f'Milliseconds per token by batch size, the table of "{ARTICLE}":',
            _milliseconds(cells, mode),
            _details(cells, mode),
        ]
    jobs = [result for result in results if result.job != ARTICLE_JOB]
    if jobs:
        parts += ["Jobs of unequal lengths:", _jobs(jobs, mode)]
    scaling = _scaling([*cells, *jobs], mode)
    if scaling is not None:
        parts += ["Tokens a second by number of ranks, in those of the fewest; a batch is that of a stream:", scaling]
    return "\n\n".join(parts) + "\n"


def _size(manifest: dict[str, Any]) -> str:
    """The model's size, which folders of earlier versions do not have."""
    return f" ({manifest['model_size']})" if "model_size" in manifest else ""


def _machine(manifest: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
    machine = manifest.get("machine")
    measured = ""
    if machine is not None:
        speed = f"{machine['bytes_per_second'] / 1e9:,.0f} GB/s, {machine['operations_per_second'] / 1e12:,.2f} TFLOP/s"
        measured = f"{machine['name']}, measured: {speed}. "
    typed = "".join(f"\n    {command}" for command in manifest.get("commands", []))
    return f"{measured}{manifest.get('date', '')}; {versions}." + (f"\n\nMeasured by\n{typed}" if typed else "")


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
        cells = {result.batch: result for result in results if (result.system, result.ranks) == (system, ranks)}
        lines.append([system, ranks, *(_cell(cells[batch], mode) if batch in cells else "" for batch in batches)])
    return table(["system", "ranks", *batches], lines)


def _cell(result: Result, mode: CountMode) -> str:
    return f"{result.milliseconds(mode):.3f}" if result.outcome == "ok" else result.outcome


def _details(results: Sequence[Result], mode: CountMode) -> str:
    lines = []
    for result in results:
        if result.outcome != "ok" or result.prefill_seconds is None:
            continue
        share = "" if result.floor_seconds is None else f"{result.floor_seconds / result.median:.0%}"
        lines.append(
            [
                result.system,
                result.ranks,
                _batch(result),
                f"{result.per_second(mode):,.0f}",
                f"{1000 * result.prefill_seconds:.1f}",
                f"{1000 * result.step_seconds:.2f}",
                share,
                _gigabytes(result.device_bytes),
                _gigabytes(result.host_bytes),
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
    for result in results:
        if result.outcome == "ok":
            numbers = [
                result.rows,
                f"{result.tokens(mode):,}",
                f"{result.median:.1f}",
                f"{result.per_second(mode):,.0f}",
                result.fits,
            ]
            lines.append(
                [
                    result.system,
                    result.ranks,
                    result.job,
                    *numbers,
                    _gigabytes(result.device_bytes),
                    _gigabytes(result.host_bytes),
                ]
            )
        else:
            lines.append([result.system, result.ranks, result.job, result.outcome, *[""] * 6])
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
    for result in results:
        if result.outcome == "ok":
            speeds.setdefault((result.system, result.job, result.batch), {})[result.ranks] = result.per_second(mode)
    speeds = {cell: by_ranks for cell, by_ranks in speeds.items() if len(by_ranks) > 1}
    counts = sorted({ranks for by_ranks in speeds.values() for ranks in by_ranks})
    lines = [
        [
            system,
            job,
            batch or "",
            *(f"{speed[n] / speed[min(speed)]:.2f}" if n in speed else "" for n in counts),
        ]
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
    for result in results:
        measured = ["", "", "", ""]
        if result.outcome == "ok":
            measured = [
                f"{result.median:.6f}",
                str(result.tokens(mode)),
                f"{result.per_second(mode):.3f}",
                f"{result.milliseconds(mode):.6f}",
            ]
        writer.writerow(
            [*(getattr(result, name) for name in names), *measured, *(getattr(result, name) for name in sizes)]
        )
    return text.getvalue()


def _plot(results: Sequence[Result], mode: CountMode) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for system, ranks in dict.fromkeys(
        (result.system, result.ranks) for result in results if result.job == ARTICLE_JOB
    ):
        cells = [
            result for result in results if (result.system, result.ranks, result.job) == (system, ranks, ARTICLE_JOB)
        ]
        good = sorted((result.batch or 0, result.per_second(mode)) for result in cells if result.outcome == "ok")
        label = system if ranks == 1 else f"{system}, {ranks} ranks"
        axes.plot([batch for batch, _ in good], [speed for _, speed in good], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="batch, rows of a stream", ylabel="tokens a second")
    batches = sorted({result.batch for result in results if result.batch is not None})
    axes.set_xticks(batches, labels=list(map(str, batches)))
    axes.set_xticks([], minor=True)
    axes.grid(visible=True, which="both", alpha=0.3)
    if axes.lines:
        axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150)
    return drawn.getvalue()


def compare(first: Folder, second: Folder, mode: CountMode) -> str:
    """The cells that both have: tokens a second, and how many times faster the other is."""
    earlier_results = {result.key: result for result in first.results()}
    lines = []
    for later in second.results():
        earlier = earlier_results.get(later.key)
        if earlier is None:
            continue
        cells = [_speed(earlier, mode), _speed(later, mode)]
        both = earlier.outcome == later.outcome == "ok"
        ratio = f"{later.per_second(mode) / earlier.per_second(mode):.2f}" if both else ""
        lines.append([later.system, later.ranks, later.job, later.batch or "", *cells, ratio])
    return table(["system", "ranks", "job", "batch", f"{first.path}", f"{second.path}", "ratio"], lines)


def _speed(result: Result, mode: CountMode) -> str:
    return f"{result.per_second(mode):,.1f}" if result.outcome == "ok" else result.outcome
