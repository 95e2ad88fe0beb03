"""`batchgen merge`: the output files of a run folder, again or of an unfinished run."""

from __future__ import annotations

from pathlib import Path

import click

from batchgen.commands import fail
from batchgen.commands._print import print_path


@click.command("merge")
@click.argument("run", metavar="RUN")
@click.option("--output-format", type=click.Choice(["jsonl", "parquet", "arrow"]), default="jsonl", show_default=True)
def command(run: str, output_format: str) -> None:
    """Write the output files of a run folder again, or of an unfinished run.

    `run` does this by itself at the end. Rows that are still open are left out; stderr says how many. The column types
    of the input are kept by `run` alone, since this command does not read the input.
    """
    from batchgen.checkpoint import CheckpointError, RunFolder, status
    from batchgen.runs import flow

    folder = RunFolder(Path(run))
    try:
        state = status(folder, verify=True)
        path = flow.merge(folder, None, output_format)  # type: ignore[arg-type]  # the choices are those of OutputFormat
    except (CheckpointError, OSError) as error:
        raise fail(error) from error
    if state.open:
        click.echo(f"batchgen: {state.open} of {state.rows} rows are open and left out", err=True)
    print_path(path)
