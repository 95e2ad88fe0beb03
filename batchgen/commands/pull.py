"""`batchgen pull`: a model onto this machine, for the machines without internet."""

from __future__ import annotations

import os
from pathlib import Path

import click

from batchgen import models
from batchgen.commands import fail
from batchgen.commands._print import print_path


@click.command("pull")
@click.argument("model", default=models.DEFAULT)
def command(model: str) -> None:
    """Prepare a model on a machine with internet; print its local path.

    MODEL is ORG/NAME or ORG/NAME@REVISION of the Hugging Face hub, or nothing for the default model,
    SmolLM2-135M-Instruct. A revision (branch, tag or commit) is resolved to its commit, which is part of the path.

    Give the printed path, or the same MODEL, to `batchgen run --model` on machines without internet.
    Hub models lie in the hub's cache (HF_HOME, HF_HUB_CACHE); HF_TOKEN and HF_ENDPOINT are honoured.
    The default model lies in BATCHGEN_CACHE, or ~/.cache/batchgen.
    """
    try:
        folder: Path = models.pull(
            model, models.cache_folder(os.environ), lambda sentence: click.echo(sentence, err=True)
        )
    except models.ModelError as error:
        raise fail(error) from error
    print_path(folder)
