"""`batchgen run-batch`: in the place of `vllm run-batch`, with resume and an answer for every line."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import click

from batchgen.checkpoint import HEARTBEAT_SECONDS
from batchgen.commands import CommandError, carry_out, conclude
from batchgen.commands.run import engine_options, recipe_of, sampling_options

# vLLM's names of what torch calls otherwise.
_DTYPES = {"half": "float16", "float": "float32"}

_PUT_TRIES = 5  # vLLM's, as is the wait
_PUT_WAIT_SECONDS = 5


@click.command("run-batch", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.option(
    "-i", "--input-file", required=True, metavar="FILE|URL", help="OpenAI batch lines; http(s) is read with GET."
)
@click.option(
    "-o",
    "--output-file",
    required=True,
    metavar="FILE|URL",
    help="One answer a line, in input order; http(s) is written with PUT.",
)
@click.option("--model", metavar="MODEL", help="As for `run`.")
@click.option("--revision", metavar="REVISION", help="Of a hub model.")
@click.option(
    "--served-model-name", metavar="NAME", help="The model that lines name; the value of --model unless given."
)
@click.option(
    "--dtype", default="auto", show_default=True, help="auto, float32, bfloat16, float16, int8, nf4; also half, float."
)
@click.option("--max-num-seqs", type=click.IntRange(min=1), metavar="N", help="vLLM's name of --batch-size.")
@click.option(
    "--error-format",
    type=click.Choice(["vllm", "openai"]),
    default="vllm",
    show_default=True,
    help="Shape of the answers to lines that fail.",
)
@click.option(
    "--run-folder",
    metavar="RUN",
    help="Where the run is kept; beside the output file, with .run behind its name, unless given.",
)
@engine_options
@sampling_options
@click.pass_context
def command(context: click.Context, /, input_file: str, output_file: str, **options: Any) -> None:
    """Answer an OpenAI batch file, with the flags of `vllm run-batch`.

    Unlike vLLM's, it answers lines for /v1/completions too, gives a bad line an error of its own instead of ending, and
    goes on where it stopped when it is called again. vLLM's other flags are ignored with a warning. Lines that name
    another model than --model are answered with 404. Exit codes are those of `run`.
    """
    if context.args:
        click.echo(f"batchgen: ignored, not known here: {' '.join(context.args)}", err=True)
    model, revision = options.pop("model"), options.pop("revision")
    served = options.pop("served_model_name") or model
    sequences = options.pop("max_num_seqs")
    options["batch_size"] = options["batch_size"] or sequences
    options["dtype"] = _DTYPES.get(options["dtype"], options["dtype"])
    options["model"] = f"{model}@{revision}" if model and revision else model
    options["recipe"] = recipe_of(options, served or _default_model())
    options["heartbeat_seconds"] = HEARTBEAT_SECONDS
    folder = Path(options.pop("run_folder") or f"{_local_name(output_file)}.run")
    try:
        status, speaks = carry_out([_fetched(input_file, folder)], str(folder), **options)
    except CommandError as error:
        if not _is_finished_run_of_another_job(folder, error):
            raise
        shutil.rmtree(folder)
        status, speaks = carry_out([_fetched(input_file, folder)], str(folder), **options)
    if speaks and not status.open:
        _deliver(folder / "generations.jsonl", output_file)
    conclude(status, speaks)


def _default_model() -> str:
    from batchgen import models

    return models.DEFAULT


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _local_name(output: str) -> str:
    return output.rstrip("/").rpartition("/")[2] if _is_url(output) else output


def _fetched(name: str, folder: Path) -> str:
    """The local file of the input; a URL is fetched once into the run folder."""
    if not _is_url(name):
        return name
    place = folder / "fetched.jsonl"
    if not place.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(name) as answer, tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                shutil.copyfileobj(answer, file)
            os.replace(file.name, place)
        except (OSError, ValueError) as error:
            raise CommandError(f"cannot read {name}: {error}") from error
    return str(place)


def _is_finished_run_of_another_job(folder: Path, error: CommandError) -> bool:
    """vLLM overwrites its output and scripts count on it; but an unfinished run is never thrown away."""
    from batchgen.checkpoint import AskedDifferently, RunFolder, status

    return isinstance(error.__cause__, AskedDifferently) and status(RunFolder(folder)).state == "finished"


def _deliver(generations: Path, output: str) -> None:
    try:
        if _is_url(output):
            _put(generations, output)
            return
        scratch = f"{output}.{os.getpid()}"
        shutil.copyfile(generations, scratch)
        os.replace(scratch, output)
    except OSError as error:
        raise CommandError(f"cannot write {output}: {error}. All answers are in {generations}") from error


def _put(generations: Path, url: str) -> None:
    for attempt in range(1, _PUT_TRIES + 1):
        try:
            with open(generations, "rb") as body:
                length = str(generations.stat().st_size)
                request = urllib.request.Request(url, body, {"Content-Length": length}, method="PUT")
                with urllib.request.urlopen(request, timeout=1000) as answer:
                    if answer.status == 200:
                        return
                    raise OSError(f"the server answered {answer.status}")
        except OSError:
            if attempt == _PUT_TRIES:
                raise
            time.sleep(_PUT_WAIT_SECONDS)
