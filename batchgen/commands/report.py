"""`batchgen report`: a page of HTML about a run: what it cost, how fast it was, what failed, what it wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from batchgen.commands import CommandError, fail
from batchgen.commands._print import print_path

_ENDINGS = (".html", ".htm")  # of no file that a run reads or writes


@click.command("report")
@click.argument("run", metavar="RUN")
@click.option("--output", metavar="FILE", help="The page.  [default: RUN/report.html]")
@click.option("--plots", metavar="FOLDER", help="The plots as PNG files.  [default: beside the page, NAME-plots]")
@click.option(
    "--rows",
    type=click.IntRange(min=0),
    default=100_000,
    show_default=True,
    help="Rows in the page's table: this many failed ones and this many good ones; of more, a uniform sample. 0: none.",
)
@click.option(
    "--text-characters",
    type=click.IntRange(min=1),
    default=2000,
    show_default=True,
    help="Of a prompt or generation that the table keeps.",
)
def command(run: str, output: str | None, plots: str | None, rows: int, text_characters: int) -> None:
    """Write one page of HTML about a run: cost, speed, errors, texts.

    It needs no network and no server, and may be sent to others. The run may be working, stopped or finished: its files
    are only read. stdout has the path of the page.
    """
    from batchgen import report
    from batchgen.checkpoint import RunFolder
    from batchgen.report.words import size_of
    from batchgen.types import UserError

    folder = Path(run)
    page = folder / "report.html" if output is None else Path(output)
    if page.suffix.lower() not in _ENDINGS:
        raise CommandError(f"--output {page}: the page is HTML, so its name must end in .html")
    images = page.with_name(f"{page.stem}-plots") if plots is None else Path(plots)
    try:
        jobs = list(_ended_jobs(folder))
        made = report.write(RunFolder(folder), page, images, rows=rows, text_characters=text_characters, jobs=jobs)
    except (UserError, OSError) as error:
        raise fail(error) from error
    click.echo(f"batchgen: {size_of(made.size)}; {len(made.plots)} plots in {images}", err=True)
    print_path(made.page)


def _ended_jobs(folder: Path) -> Iterator[str]:
    from batchgen import slurm

    for path in sorted((folder / "jobs").glob("*.ended.json")):
        task = path.name.partition(".")[0]
        end = slurm.end_of(folder, task)
        if end is not None:
            yield f"Job {task} {end[0]}: {end[1]}"
