"""`batchgen split`: a model as files by rank, for file systems where many small reads are slow."""

from __future__ import annotations

import os
from pathlib import Path

import click

from batchgen import models
from batchgen.commands import fail, log_to_stderr, results_only_on_stdout
from batchgen.commands._print import print_path
from batchgen.types import UserError


@click.command("split")
@click.argument("model")
@click.argument("out", metavar="OUT")
@click.option(
    "--tp", type=click.IntRange(min=2), required=True, metavar="N", help="How many ranks will share the model."
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "int8"]),
    default="auto",
    show_default=True,
    help="The number type of the weights; int8 loses precision.",
)
def command(model: str, out: str, tp: int, dtype: str) -> None:
    """Write MODEL into the folder OUT, split over N ranks; print its path.

    `batchgen run --model OUT --tp N` reads it, with engine ds-inference or paged. A local disk does not need this: each
    rank reads only its own part of an ordinary model, too. On a parallel file system those are many small reads, and of
    a split model they are few large ones. A run that was begun with MODEL goes on with OUT.

    The command needs memory for one rank's share, and no GPU.
    """
    log_to_stderr(0, 1)
    try:
        source = models.resolve(model, models.cache_folder(os.environ), _say)
        with results_only_on_stdout():
            from batchgen import tensor_parallel

            made = tensor_parallel.write_split(source, Path(out), tp, dtype, _say)
    except UserError as error:
        raise fail(error) from error
    print_path(made)


def _say(sentence: str) -> None:
    click.echo(f"batchgen: {sentence}", err=True)
