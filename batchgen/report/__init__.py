"""`batchgen report`: one page of HTML from a run folder, and its plots as PNG files.

The page holds all it shows: style, script, drawings and rows. It asks no network for anything, and forbids itself to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from batchgen.checkpoint import CheckpointError, Places, RunFolder, read_json, status
from batchgen.files import write_atomic
from batchgen.report.batches import Batches, Clock, speed
from batchgen.report.history import starts
from batchgen.report.page import Report, render
from batchgen.report.plots import NAMES, draw
from batchgen.report.rows import gather

_MEASURED = 10_000  # rows whose lengths are looked at where the page has none


@dataclass(frozen=True)
class Written:
    """What `write` has made."""

    page: Path
    size: int  # bytes of the page
    plots: list[Path]


def write(
    folder: RunFolder,
    page: Path,
    plots: Path,
    *,
    rows: int,
    text_characters: int,
    jobs: Sequence[str] = (),
) -> Written:
    """Writes the report of the run in `folder`, which may be working, and of which only files are read.

    Args:
        page: the HTML file, replaced at once.
        plots: the folder of the PNG files.
        rows: failed ones and good ones, of each this many, that the page's table has; of more, a uniform sample.
        text_characters: of a prompt, a text or other columns that the table keeps.
        jobs: a sentence for each Slurm job that has ended by itself.

    Raises:
        CheckpointError: it is no run folder, or the report cannot be written there.
    """
    state = status(folder)
    manifest = read_json(folder.path / "run.json")
    batches = Batches.read(folder)
    history = starts(folder, state.attempts, batches.table)
    clock = Clock.of([(start.begin, start.end) for start in history])
    places = Places.find(folder, state.rows)
    read = gather(places, batches, folder.read_identity().get("prompt_column"), rows or _MEASURED, text_characters)
    report = Report(state, manifest, history, clock, speed(batches.table, clock), read, text_characters, rows > 0, jobs)
    drawn = list(draw(batches.table, clock, report.speed, history, read))
    text = render(report, drawn).encode("utf-8", "replace")  # half of a surrogate pair is no character
    try:
        plots.mkdir(parents=True, exist_ok=True)
        images = {plot.name: plot.png for plot in drawn}
        for name in NAMES:
            if name in images:
                write_atomic(plots / f"{name}.png", images[name], durable=False)
            else:
                (plots / f"{name}.png").unlink(missing_ok=True)  # of an earlier report: it is not so any more
        write_atomic(page, text)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {error.filename or page}: {error.strerror or error}. Choose another place with --output"
        ) from error
    return Written(page, len(text), [plots / f"{name}.png" for name in images])
