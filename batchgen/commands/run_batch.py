"""`batchgen run-batch`: in the place of `vllm run-batch`, with resume and an answer for every line."""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import tempfile
import time
import urllib.parse
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError

import click

from batchgen.checkpoint import HEARTBEAT_SECONDS
from batchgen.commands import CommandError, Unfinished, carry_out, conclude, fail, generation_config_option
from batchgen.commands.run import command as run_command
from batchgen.commands.run import engine_options, recipe_of, sampling_options
from batchgen.redaction import redacted
from batchgen.types import WHOLE

# vLLM's names of what torch calls otherwise.
_DTYPES = {"half": "float16", "float": "float32"}

_DISCARDING = "discarding"  # stands in a run folder while a finished run is removed from it

_PUT_TRIES, _PUT_WAIT_SECONDS = 5, 5  # vLLM's
_TIMEOUT_SECONDS = 1000

# What a run leaves in its folder; nothing else in there is ever deleted.
_RUN_FILES = (
    *("attempts/*.json", "attempts/*.txt", "input/*", "fetched-*", "timing.jsonl", "errors.jsonl", "merged.json"),
    *("generations.jsonl", "generations-[0-9]*-[0-9]*.jsonl", "batches-[0-9]*-[0-9]*.jsonl", "limits-*.json"),
    *("run.json", "delivered.json"),
)


class _RunBatch(click.Command):
    """vLLM has flags of one dash and several characters, like -O3 and -cc.mode=3. Click would look for our -i and -o
    among their letters; with a NUL in front, which no argument can hold, each is a plain word to it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = (one for one in self.params if isinstance(one, click.Option) and not one.is_flag)
        with_value = {name for one in options for name in one.opts}
        words, is_value = [], False
        for word in args:
            unknown = len(word) > 2 and word[0] == "-" and word[1] not in "-io" and not is_value
            words.append(f"\0{word}" if unknown else word)
            is_value = word in with_value and not is_value
        rest = super().parse_args(ctx, words)
        ctx.args = [word.removeprefix("\0") for word in ctx.args]
        return rest


@click.command("run-batch", cls=_RunBatch, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
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
@generation_config_option("auto")
@click.pass_context
def command(context: click.Context, /, input_file: str, output_file: str, **options: Any) -> None:
    """Answer an OpenAI batch file, with the flags of `vllm run-batch`.

    Unlike vLLM's, it answers lines for /v1/completions too, gives a bad line an error of its own instead of ending, and
    goes on where it stopped when it is called again. vLLM's other flags are ignored with a warning. Lines that name
    another model than --model are answered with 404. Exit codes are those of `run`.
    """
    from batchgen import models

    if context.args:
        _check_ignored(context)
        click.echo(f"batchgen: ignored, not known here: {' '.join(context.args)}", err=True)
    model, options["model"] = options["model"], model_of(options)
    del options["revision"]
    served = options.pop("served_model_name") or (model and model.partition("@")[0])
    sequences = options.pop("max_num_seqs")
    options["batch_size"] = options["batch_size"] or sequences
    options["dtype"] = _DTYPES.get(options["dtype"], options["dtype"])
    options["recipe"] = recipe_of(options, served or models.DEFAULT)
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
        status, speaks = carry_out([_fetched(input_file, folder)], str(folder), **options)
    except CommandError as error:
        if not _is_finished_run_of_another_job(folder, error):
            raise
        click.echo(f"batchgen: {error}", err=True)
        click.echo(f"batchgen: the run in {folder} is finished, so this is a new one, from the beginning", err=True)
        _discard(folder)
        status, speaks = carry_out([_fetched(input_file, folder)], str(folder), **options)
    # Among ranks of torchrun or srun, the one that has merged ends the attempt.
    if not status.open and (speaks or status.attempts[-1].ended is not None):
        _deliver(folder / "generations.jsonl", output_file)
        _note_delivered(folder)
        click.echo(redacted(output_file, os.environ))
    conclude(status, speaks)


def _check_ignored(context: click.Context) -> None:
    """Raises CommandError for what must not be ignored: what `run` knows, what would change the answers, and what is
    nearly an option of this command."""
    own = {name for parameter in context.command.params for name in parameter.opts}
    others = {name for parameter in run_command.params for name in parameter.opts if name.startswith("--")} - own
    for word in context.args:
        name = word.partition("=")[0]
        if name in others or name == "--chat-template":
            raise CommandError(f"run-batch has no {name}; {'`batchgen run` has' if name in others else 'leave it out'}")
        near = difflib.get_close_matches(name, own, 1, 0.9) if name.startswith("--") else []
        if near:
            raise CommandError(f"run-batch has no {name}; is {near[0]} meant?")


def folder_of(options: dict[str, Any]) -> Path:
    """The run folder of these options."""
    return Path(options["run_folder"] or f"{_local_name(options['output_file'])}.run")


def model_of(options: dict[str, Any]) -> str | None:
    """The model of these options, as `run` names it."""
    model, revision = options["model"], options["revision"]
    return f"{model}@{revision}" if model and revision else model


def is_url(name: str) -> bool:
    """Whether this file is read with GET, or written with PUT."""
    return name.startswith(("http://", "https://"))


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
            _fetch(name, place)
        except (OSError, ValueError, HTTPException) as error:
            raise CommandError(f"cannot read {name}: {error}") from error
    return str(place)


def _fetch(url: str, place: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix="fetched-", suffix=".jsonl", delete=False) as file:
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:
                shutil.copyfileobj(answer, file)
                announced = answer.headers.get("Content-Length")
            file.flush()
            # urllib takes a connection that breaks for the end.
            if announced is not None and file.tell() != int(announced):
                raise OSError(f"it broke off after {file.tell()} of {announced} bytes")
            os.replace(file.name, place)
        except BaseException:
            os.unlink(file.name)
            raise


def _is_finished(folder: Path) -> bool:
    from batchgen.checkpoint import CheckpointError, RunFolder, status

    try:
        return _is_delivered(folder) and status(RunFolder(folder)).state == "finished"
    except CheckpointError as error:
        raise fail(error) from error


def _note_delivered(folder: Path) -> None:
    from batchgen.checkpoint import write_atomic

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
    from batchgen.checkpoint import AskedDifferently
    from batchgen.formats import Changed

    return isinstance(error.__cause__, (AskedDifferently, Changed)) and _is_finished(folder)


def _discard(folder: Path) -> None:
    """Removes a finished run. Whatever ends this in the middle, the next start goes on with it."""
    begun = folder / _DISCARDING
    begun.touch()
    for pattern in _RUN_FILES:
        for path in folder.glob(pattern):
            if path.is_file():
                path.unlink(missing_ok=True)
    begun.unlink()


def _deliver(generations: Path, output: str) -> None:
    scratch = f"{output}.{os.getpid()}.{os.urandom(4).hex()}"
    try:
        if is_url(output):
            _put(generations, output)
            return
        try:
            with open(generations, "rb") as answers, open(scratch, "xb") as file:
                shutil.copyfileobj(answers, file)
            os.replace(scratch, output)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
    except (OSError, HTTPException) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise Unfinished(
            f"cannot write {output}: {reason}. All answers are in {generations}; the same command tries again"
        ) from error


def _put(generations: Path, url: str) -> None:
    for attempt in range(1, _PUT_TRIES + 1):
        try:
            with open(generations, "rb") as body:
                # urllib would call it a form, and a signed URL is for one content type.
                headers = {
                    "Content-Length": str(generations.stat().st_size),
                    "Content-Type": "application/octet-stream",
                }
                request = urllib.request.Request(url, body, headers, method="PUT")
                with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
                    return  # 2xx; anything else is an exception
        except (OSError, HTTPException) as error:
            if isinstance(error, HTTPError):
                error.close()  # it holds the connection
            if attempt == _PUT_TRIES:
                raise
            time.sleep(_PUT_WAIT_SECONDS)
