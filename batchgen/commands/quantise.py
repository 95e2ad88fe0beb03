"""`batchgen quantise`: a model whose weights are rounded to 8 or 4 bits, once."""

from __future__ import annotations

import os
from pathlib import Path

import click

from batchgen import models
from batchgen.commands import fail, log_to_stderr, results_only_on_stdout
from batchgen.commands._print import print_path
from batchgen.types import UserError


@click.command("quantise")
@click.argument("model")
@click.argument("out", metavar="OUT")
@click.option(
    "--dtype", type=click.Choice(["fp8", "int8", "int4"]), required=True, help="What the weights are rounded to."
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    metavar="N",
    help="With int4: columns that share a scale, 32, 64 or 128; unless it is given, the largest that divides the rows "
    "of all matrices.",
)
def command(model: str, out: str, dtype: str, group_size: str | None) -> None:
    """Write MODEL into the folder OUT, its weights rounded to 8 or 4 bits; print its path.

    `batchgen run --model OUT` reads it, and so do other programs: the format is that of compressed-tensors. The text is
    that of `batchgen run --model MODEL --dtype DTYPE`, which rounds the weights each time it loads them. Embeddings,
    the output matrix, norms and what chooses experts are not rounded.

    The command rounds on a GPU if there is one. It needs memory for 2 GB and the largest parameter.
    """
    log_to_stderr(0, 1)
    if group_size is not None and dtype != "int4":
        raise click.UsageError(f"--group-size is of --dtype int4 alone; {dtype} has a scale for each row")
    try:
        source = models.resolve(model, models.cache_folder(os.environ), _say)
        with results_only_on_stdout():
            from batchgen import tensor_parallel

            made = tensor_parallel.write_quantised(source, Path(out), dtype, int(group_size or 0), _say)
    except UserError as error:
        raise fail(error) from error
    print_path(made)


def _say(sentence: str) -> None:
    click.echo(f"batchgen: {sentence}", err=True)
