"""`batchgen run`: the main command."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from batchgen.checkpoint import HEARTBEAT_SECONDS
from batchgen.commands import fail, generation_config_option, log_to_stderr, results_only_on_stdout
from batchgen.commands._conversations import CONVERSATION_OPTIONS, conversation_options
from batchgen.commands._options import adapter_option, engine_options
from batchgen.commands._print import print_path
from batchgen.commands._runs import carry_out, conclude, settings_of
from batchgen.commands._sampling import read_sampling, sampling_options
from batchgen.commands._values import id_prefix, json_object, template_text
from batchgen.types import WHOLE, Shard, UserError

DTYPES = ("auto", "float32", "bfloat16", "float16", "fp8", "int8", "int4", "nf4")


def _shard(context: click.Context, parameter: click.Parameter, text: str | None) -> Shard:
    try:
        return WHOLE if text is None else Shard.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command("run")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…")
@click.option("-o", "--out", metavar="RUN", help="The run folder; unless it is given, it is named after the input.")
@click.option(
    "--model",
    metavar="MODEL",
    help="The model: a folder, or ORG/NAME[@REVISION] that `batchgen pull` has fetched. The default is a small model.",
)
@adapter_option
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="The number type of the weights; fp8, int8, int4 and nf4 lose precision.",
)
@engine_options
@sampling_options
@generation_config_option("none")
@conversation_options
@click.option(
    "--prompt-column",
    metavar="NAME",
    help='The column that holds the prompt; unless it is given, "prompt" or "messages".',
)
@click.option(
    "--template",
    metavar="TEXT|@FILE",
    callback=template_text,
    help="Make the prompt from the columns by this Jinja template.",
)
@click.option(
    "--chat-template-kwargs",
    metavar="JSON",
    callback=json_object,
    help="Variables that are passed to the model's chat template, as a JSON object.",
)
@click.option(
    "--truncate",
    type=click.Choice(["left", "right"]),
    help="Cut prompts that are too long on this side; unless it is given, they are error rows.",
)
@id_prefix
@click.option("--strict", is_flag=True, help="Check all rows before the model loads, and stop if a row is bad.")
@click.option(
    "--max-error-rate",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Stop once more than this share of the rows has failed.",
)
@click.option(
    "--output-format",
    type=click.Choice(["jsonl", "parquet", "arrow"]),
    default="jsonl",
    show_default=True,
    help="The format of the merged generations.",
)
@click.option(
    "--error-format",
    type=click.Choice(["openai", "vllm"]),
    default="openai",
    show_default=True,
    help="The shape of the answers to OpenAI lines that fail.",
)
@click.option(
    "--shard",
    metavar="I/N",
    callback=_shard,
    help="Do only every N-th row, from row I on (0 to N-1); other processes do the rest at the same time, and the "
    "last one to finish merges.",
)
@click.option(
    "--heartbeat-seconds",
    type=click.FloatRange(min=0.01),
    default=HEARTBEAT_SECONDS,
    show_default=True,
    help="The seconds between two heartbeats; after 18 missed heartbeats another host may take the run over.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and the first prompt; load no model and write nothing.")
def command(inputs: tuple[str, ...], out: str | None, dry_run: bool, **options: Any) -> None:
    """Generate for every prompt of the input files, exactly once.

    INPUT is a JSONL (also .gz, .zst), Parquet or Arrow file, a folder saved by `datasets`, or a pattern in quotes. Each
    row has a `prompt` or `messages`, or is a line of an OpenAI batch file; it may set its own sampling parameters.

    Whatever stops a run, the same command goes on where it stopped, also with another engine, batch size or number of
    ranks. The path of the generations is printed on stdout.

    Exit codes: 0: all rows are good. 3: the run is finished, and some rows have failed (errors.jsonl). 75: the run has
    stopped or died; the same command goes on. 4: it could not run.
    """
    options["recipe"] = recipe_of(options)
    if dry_run:
        _describe(inputs, options)
        return
    status, reports_outcome = carry_out(inputs, out, options)
    if reports_outcome and status.merged and not status.open:
        print_path(status.folder / f"generations.{options['output_format']}")
    conclude(status, reports_outcome)


def folder_of(options: dict[str, Any]) -> Path:
    """The run folder of these options."""
    from batchgen.runs.flow import default_folder

    return Path(options["out"]) if options["out"] is not None else default_folder(options["inputs"])


def recipe_of(options: dict[str, Any], model: str | None = None, adapters: Iterable[str] = ()) -> Any:
    """Takes what belongs to `Recipe` and `SamplingParams` out of `options`, and makes the recipe.

    Args:
        model: that every row must ask for, or one of `adapters`; None: rows may ask for any.

    Raises:
        CommandError: a value is out of range.
    """
    from batchgen.requests.recipe import Recipe

    try:
        sampling, typed = read_sampling(options)
        columns = {name: options.pop(name, None) for name in ("prompt_column", "template", "truncate", "id_prefix")}
        further = ("chat_template_kwargs", "generation_config", *CONVERSATION_OPTIONS)
        columns |= {name: options.pop(name) for name in further if name in options}
        return Recipe(sampling=sampling, model=model, adapters=tuple(adapters), set_by_user=typed, **columns)
    except ValueError as error:
        raise fail(error) from error


def _describe(inputs: tuple[str, ...], options: dict[str, Any]) -> None:
    """What a dry run prints: the plan, and the first prompt."""
    from batchgen.checkpoint import RunFolder
    from batchgen.runs.manifest import describe
    from batchgen.runs.prepare import check_all, prepare
    from batchgen.runs.role import Role
    from batchgen.world import from_environment

    log_to_stderr(0, 1)
    try:
        with tempfile.TemporaryDirectory(prefix="batchgen-") as scratch, results_only_on_stdout():
            settings = settings_of(options)
            role = Role(from_environment(os.environ), os.environ, options["ranks"])
            ready = prepare(inputs, RunFolder(Path(scratch)), settings, role, scan_into=Path(scratch))
            if settings.strict:
                check_all(ready)
            plan = describe(ready, role.ranks)
    except UserError as error:
        raise fail(error) from error
    click.echo(plan)
