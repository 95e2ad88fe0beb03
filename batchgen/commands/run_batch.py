"""`batchgen run-batch`: in the place of `vllm run-batch`, with resume and an answer for every line."""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.parse
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import click

from batchgen.checkpoint import HEARTBEAT_SECONDS
from batchgen.commands import CommandError, Unfinished, fail, generation_config_option
from batchgen.commands._conversations import conversation_options
from batchgen.commands._options import adapter_option, engine_options
from batchgen.commands._print import print_path
from batchgen.commands._quantization import choose_dtype, quantization_option
from batchgen.commands._runs import carry_out, conclude
from batchgen.commands._sampling import sampling_options
from batchgen.commands._values import id_prefix, json_object
from batchgen.commands._vllm_flags import RunBatch
from batchgen.commands.run import recipe_of
from batchgen.files import replacing
from batchgen.redaction import redact
from batchgen.runs.transfer import fetch, is_url, put
from batchgen.types import WHOLE

if TYPE_CHECKING:
    from batchgen.checkpoint import Status

# vLLM's names of what torch calls otherwise.
_DTYPES = {"half": "float16", "float": "float32"}

_DISCARDING = "discarding"  # stands in a run folder while a finished run is removed from it

# What a run leaves in its folder; nothing else in there is ever deleted.
_RUN_FILES = (
    *("attempts/*.json", "attempts/*.txt", "input/*", "fetched-*", "timing.jsonl", "errors.jsonl", "merged.json"),
    *("generations.jsonl", "generations-[0-9]*-[0-9]*.jsonl", "batches-[0-9]*-[0-9]*.jsonl", "limits-*.json"),
    "grown-*.json",
    *("run.json", "delivered.json"),
)


@click.command("run-batch", cls=RunBatch)
@click.option(
    "-i",
    "--input-file",
    required=True,
    metavar="FILE|URL",
    help="The file of OpenAI batch lines; an http(s) address is read with GET.",
)
@click.option(
    "-o",
    "--output-file",
    required=True,
    metavar="FILE|URL",
    help="The file of answers, one for each line and in the same order; an http(s) address is written with PUT.",
)
@click.option("--model", metavar="MODEL", help="The model, as for `run`.")
@adapter_option
@click.option("--revision", metavar="REVISION", help="The revision of a model of the hub.")
@click.option(
    "--served-model-name",
    metavar="NAME",
    help="The model that the lines name; unless it is given, the value of --model.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="The number type of the weights: auto, float32, bfloat16, float16, fp8, int8, int4, nf4, half or float.",
)
@quantization_option
@click.option(
    "--default-chat-template-kwargs",
    "--chat-template-kwargs",
    "chat_template_kwargs",
    metavar="JSON",
    callback=json_object,
    help="Variables that are passed to the model's chat template, as a JSON object; a line's own win.",
)
@click.option(
    "--max-num-seqs", type=click.IntRange(min=1), metavar="N", help="The name that vLLM gives to --batch-size."
)
@click.option(
    "--error-format",
    type=click.Choice(["vllm", "openai"]),
    default="vllm",
    show_default=True,
    help="The shape of the answers to lines that fail.",
)
@click.option(
    "--run-folder",
    metavar="RUN",
    help="The run folder; unless it is given, it lies beside the output file and has .run behind that file's name.",
)
@engine_options
@sampling_options
@generation_config_option("auto")
@conversation_options
@id_prefix
@click.pass_context
def command(context: click.Context, /, input_file: str, output_file: str, **options: Any) -> None:
    """Answer an OpenAI batch file, with the flags of `vllm run-batch`.

    Unlike vLLM's, it answers lines for /v1/completions too, gives a bad line an error of its own instead of ending, and
    goes on where it stopped when it is called again. vLLM's other flags are ignored with a warning. Lines that name
    another model than --model are answered with 404. Exit codes are those of `run`.
    """
    from batchgen import models

    if context.args:
        click.echo(f"batchgen: ignored, since no answer depends on them here: {', '.join(context.args)}", err=True)
    model, options["model"] = options["model"], model_of(options)
    del options["revision"]
    served = options.pop("served_model_name") or (model and model.partition("@")[0])
    sequences = options.pop("max_num_seqs")
    options["batch_size"] = options["batch_size"] or sequences
    options["dtype"] = _DTYPES.get(options["dtype"], options["dtype"])
    options["dtype"] = choose_dtype(options.pop("quantization"), options["dtype"], options["model"])
    options["recipe"] = recipe_of(options, served or models.DEFAULT, options["adapters"])
    options["heartbeat_seconds"], options["shard"] = HEARTBEAT_SECONDS, WHOLE
    for name in (input_file, output_file):
        if is_url(name) and "@" in urllib.parse.urlsplit(name).netloc:
            raise CommandError(f"{name} has a user or a password in it, which cannot be used: take a signed address")
    folder = folder_of({**options, "output_file": output_file})
    del options["run_folder"]
    parent = Path(output_file).absolute().parent
    there = parent.is_dir() or parent == folder.absolute().parent  # which is made with the run folder
    if not is_url(output_file) and (os.path.isdir(output_file) or not there):
        raise CommandError(f"{output_file} cannot be written: it is a folder, or is to be in one that is not there")
    if not is_url(output_file) and os.path.exists(output_file) and _is_same_file(input_file, output_file):
        raise CommandError(f"{output_file} is the input: the answers would take its place. Name another file with -o")
    if (folder / _DISCARDING).exists():
        _discard(folder)
    try:
        outcome = _carry_out(input_file, folder, options)
    except CommandError as error:
        if not _is_finished_run_of_another_job(folder, error):
            raise
        click.echo(f"batchgen: {error}", err=True)
        click.echo(f"batchgen: the run in {folder} is finished, so this is a new one, from the beginning", err=True)
        _discard(folder)
        outcome = _carry_out(input_file, folder, options)
    if outcome is None:
        _answer_nothing(output_file)
        return
    status, reports_outcome = outcome
    # Among ranks of torchrun or srun, the one that has merged ends the attempt.
    if not status.open and (reports_outcome or status.attempts[-1].ended is not None):
        _deliver(folder / "generations.jsonl", output_file)
        _note_delivered(folder)
        print_path(redact(output_file, os.environ))
    conclude(status, reports_outcome)


def _carry_out(input_file: str, folder: Path, options: dict[str, Any]) -> tuple[Status, bool] | None:
    """Carries the run out, as `_runs.carry_out` does; None if there is no line to answer, and no run that had some."""
    from batchgen.formats import InputError
    from batchgen.formats.input import files_of
    from batchgen.formats.jsonl import is_blank

    source = _fetched(input_file, folder)
    try:
        files = files_of([source])
        if not (folder / "run.json").exists() and all(file.is_file() and is_blank(file) for file in files):
            if is_url(input_file):  # it may hold something next time
                Path(source).unlink(missing_ok=True)
                with suppress(OSError):
                    folder.rmdir()
            return None
    except InputError as error:
        raise fail(error) from error
    return carry_out([source], str(folder), options)


def _answer_nothing(output_file: str) -> None:
    """An empty file of lines has an empty file of answers, as with vLLM."""
    from batchgen.world import from_environment

    if from_environment(os.environ).rank == 0:
        _deliver(Path(os.devnull), output_file)
        click.echo("batchgen: finished; the input has no line, and so has the output", err=True)
        print_path(redact(output_file, os.environ))


def folder_of(options: dict[str, Any]) -> Path:
    """The run folder of these options."""
    return Path(options["run_folder"] or f"{_local_name(options['output_file'])}.run")


def model_of(options: dict[str, Any]) -> str | None:
    """The model of these options, as `run` names it."""
    model, revision = options["model"], options["revision"]
    return f"{model}@{revision}" if model and revision else model


def _local_name(output: str) -> str:
    if not is_url(output):
        return output
    # Not what stands behind "?": the signature of a signed URL, another one at every start.
    return PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(output).path)).name or "output"


def _is_same_file(name: str, other: str) -> bool:
    return not is_url(name) and os.path.exists(name) and os.path.samefile(name, other)


def _fetched(name: str, folder: Path) -> str:
    """The local file of the input. A URL is fetched into the run folder, once for a run and all its ranks: an
    unfinished one goes on with what it began with, and a finished one must see whether there is a new input."""
    if not is_url(name):
        return name
    packed = [end for end in (".gz", ".zst") if urllib.parse.urlsplit(name).path.endswith(f".jsonl{end}")]
    place = folder / f"fetched-{hashlib.sha256(name.encode()).hexdigest()[:16]}.jsonl{''.join(packed)}"
    if not place.exists() or _is_finished(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fetch(name, place)
        except (OSError, ValueError) as error:
            raise CommandError(f"cannot read {name}: {error}") from error
    return str(place)


def _is_finished(folder: Path) -> bool:
    from batchgen.checkpoint import CheckpointError, RunFolder, status

    try:
        return _is_delivered(folder) and status(RunFolder(folder)).state == "finished"
    except CheckpointError as error:
        raise fail(error) from error


def _note_delivered(folder: Path) -> None:
    from batchgen.files import write_atomic

    with suppress(OSError):  # it is delivered all the same
        write_atomic(folder / "delivered.json", (folder / "merged.json").read_bytes())


def _is_delivered(folder: Path) -> bool:
    """Whether what is merged now is what was delivered last."""
    try:
        return (folder / "delivered.json").read_bytes() == (folder / "merged.json").read_bytes()
    except FileNotFoundError:
        return False


def _is_finished_run_of_another_job(folder: Path, error: CommandError) -> bool:
    """vLLM overwrites its output and scripts count on it; but an unfinished run is never thrown away."""
    from batchgen.checkpoint import DifferentRun
    from batchgen.formats import Changed

    return isinstance(error.__cause__, (DifferentRun, Changed)) and _is_finished(folder)


def _discard(folder: Path) -> None:
    """Removes a finished run. Whatever ends this in the middle, the next start goes on with it."""
    marker = folder / _DISCARDING
    marker.touch()
    for pattern in _RUN_FILES:
        for path in folder.glob(pattern):
            if path.is_file():
                path.unlink(missing_ok=True)
    marker.unlink()


def _deliver(generations: Path, output: str) -> None:
    try:
        if is_url(output):
            put(generations, output)
        else:
            with replacing(Path(output)) as scratch:
                shutil.copyfile(generations, scratch)
    except OSError as error:
        reason = error.strerror or error
        raise Unfinished(
            f"cannot write {output}: {reason}. All answers are in {generations}; the same command tries again"
        ) from error
