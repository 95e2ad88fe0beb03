"""`batchgen run`: the main command."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from batchgen import engines
from batchgen.checkpoint import HEARTBEAT_SECONDS
from batchgen.commands import fail, generation_config_option, log_to_stderr, results_only_on_stdout
from batchgen.commands._runs import carry_out, conclude, settings_of
from batchgen.commands._values import TokenLimit, id_prefix, json_object, stop_texts, template_text
from batchgen.planning.auto import AUTO
from batchgen.runs.watchdog import STALL_SECONDS
from batchgen.types import WHOLE, SamplingParams, Shard, UserError

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "nf4")


def _shard(context: click.Context, parameter: click.Parameter, text: str | None) -> Shard:
    try:
        return WHOLE if text is None else Shard.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `SamplingParams`, each with the default that stands there."""
    defaults = SamplingParams
    for option in reversed(
        (
            click.option(
                "--max-new-tokens",
                type=TokenLimit(),
                metavar="N|fit",
                default=defaults.max_new_tokens,
                show_default=True,
                help="Most tokens to generate for a row; fit is as many as the model's context leaves.",
            ),
            click.option(
                "--temperature", type=float, default=defaults.temperature, show_default=True, help="0 is greedy."
            ),
            click.option("--top-p", type=float, default=defaults.top_p, show_default=True, help="Nucleus; 1 is off."),
            click.option("--top-k", type=int, default=defaults.top_k, show_default=True, help="0 is off."),
            click.option(
                "--seed",
                type=int,
                default=defaults.seed,
                show_default=True,
                help="Of sampling, together with each row's id.",
            ),
            click.option(
                "--stop",
                multiple=True,
                metavar="TEXT",
                callback=stop_texts,
                help="End a text before this; may be given several times. \\n is a line end, \\t a tab, "
                "\\\\ a backslash.",
            ),
            click.option(
                "--logprobs",
                is_flag=True,
                default=defaults.logprobs,
                help="Give the log-probability of every generated token.",
            ),
        )
    ):
        command = option(command)
    return command


_SHORT_FORMS = ("offload", "tp")  # flags that are `--set NAME=VALUE`: the engine says whether it knows them

_ENGINE_OPTIONS = (
    click.option(
        "--engine",
        type=click.Choice([AUTO, *engines.names()]),
        default=AUTO,
        show_default=True,
        help="What generates; auto: the fastest that fits, by forecast.",
    ),
    click.option(
        "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of the engine; wrong names list all."
    ),
    click.option(
        "--offload",
        metavar="cpu|nvme=FOLDER",
        help="Where the weights wait for their turn (ds-zero). Short for --set offload=….",
    ),
    click.option(
        "--tp",
        type=click.IntRange(min=1),
        metavar="N",
        help="Ranks that share a model (ds-inference, paged), and how many to start. Short for --set tp=N.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        metavar="N",
        help="Most prompts in a batch; as many as fit unless given.",
    ),
    click.option(
        "--selftest/--no-selftest",
        default=True,
        show_default=True,
        help="Compare rows of the first batch with themselves alone; stop if the batch has changed them.",
    ),
    click.option(
        "--ranks",
        "--gpus",
        type=click.IntRange(min=1),
        metavar="N",
        help="Processes to start on this host, one a GPU; 1, or --tp, unless given. Ignored where torchrun or "
        "srun has started them.",
    ),
    click.option(
        "--stall-seconds",
        type=click.FloatRange(min=0),
        default=STALL_SECONDS,
        show_default=True,
        help="Without a step for so long, log where every rank stands and end, to be started again; 0 is never.",
    ),
)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What does the work: shared by `run` and `run-batch`."""

    @wraps(command)
    def spelled_out(*arguments: Any, settings: tuple[str, ...], **options: Any) -> Any:
        given = {name: options.pop(name) for name in _SHORT_FORMS}
        short = [f"{name}={value}" for name, value in given.items() if value is not None]
        options["ranks"] = options["ranks"] or given["tp"] or 1
        return command(*arguments, settings=(*short, *settings), **options)

    decorated: Callable[..., Any] = spelled_out
    for option in reversed(_ENGINE_OPTIONS):
        decorated = option(decorated)
    return decorated


@click.command("run")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…")
@click.option("-o", "--out", metavar="RUN", help="The run folder; named after the input unless given.")
@click.option(
    "--model",
    metavar="MODEL",
    help="A folder, or ORG/NAME[@REVISION] that `batchgen pull` has fetched. The default model is small.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="Of the weights; int8 and nf4 lose precision.",
)
@engine_options
@sampling_options
@generation_config_option("none")
@click.option(
    "--prompt-column", metavar="NAME", help='The column with the prompt; "prompt" or "messages" unless given.'
)
@click.option(
    "--template",
    metavar="TEXT|@FILE",
    callback=template_text,
    help="Render the prompt from the columns: a Jinja template.",
)
@click.option(
    "--chat-template-kwargs", metavar="JSON", callback=json_object, help="Passed to the model's chat template."
)
@click.option(
    "--truncate",
    type=click.Choice(["left", "right"]),
    help="Cut prompts that are too long on this side; they are error rows unless given.",
)
@id_prefix
@click.option("--strict", is_flag=True, help="Check all rows before the model loads, and stop if one is bad.")
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
    help="Of the merged generations.",
)
@click.option(
    "--error-format",
    type=click.Choice(["openai", "vllm"]),
    default="openai",
    show_default=True,
    help="Of the answers to OpenAI lines that fail.",
)
@click.option(
    "--shard",
    metavar="I/N",
    callback=_shard,
    help="Do only every N-th row, from row I on; others do the rest at the same time. The last to finish merges.",
)
@click.option(
    "--heartbeat-seconds",
    type=click.FloatRange(min=0.01),
    default=HEARTBEAT_SECONDS,
    show_default=True,
    help="Between heartbeats; after 18 missed ones another host may take the run over.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and the first prompt; load no model, write nothing.")
def command(inputs: tuple[str, ...], out: str | None, dry_run: bool, **options: Any) -> None:
    """Generate for every prompt of the input files, exactly once.

    INPUT is a JSONL (also .gz, .zst), Parquet or Arrow file, a folder saved by `datasets`, or a pattern in quotes. Each
    row has a `prompt`, `messages`, or is a line of an OpenAI batch file; it may set its own sampling parameters.

    The same command goes on where it stopped, whatever stopped it, also with another engine, batch size or number of
    ranks. The path of the generations is printed on stdout.

    Exit codes: 0 all rows good; 3 finished, some rows failed (errors.jsonl); 75 stopped or died, start again to go on;
    4 could not run.
    """
    options["recipe"] = recipe_of(options)
    if dry_run:
        _describe(inputs, options)
        return
    status, speaks = carry_out(inputs, out, options)
    if speaks and status.merged and not status.open:
        click.echo(status.folder / f"generations.{options['output_format']}")
    conclude(status, speaks)


def folder_of(options: dict[str, Any]) -> Path:
    """The run folder of these options."""
    from batchgen.runs.flow import default_folder

    return Path(options["out"]) if options["out"] is not None else default_folder(options["inputs"])


def recipe_of(options: dict[str, Any], model: str | None = None) -> Any:
    """Takes what belongs to `Recipe` and `SamplingParams` out of `options`, and makes the recipe.

    Raises:
        CommandError: a value is out of range.
    """
    from batchgen.requests.recipe import Recipe

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop", "logprobs")
    source = click.get_current_context().get_parameter_source
    typed = frozenset(name for name in names if source(name) not in (None, click.core.ParameterSource.DEFAULT))
    try:
        sampling = SamplingParams(**{name: options.pop(name) for name in names})
        columns = {name: options.pop(name, None) for name in ("prompt_column", "template", "truncate", "id_prefix")}
        further = ("chat_template_kwargs", "generation_config")
        columns |= {name: options.pop(name) for name in further if name in options}
        return Recipe(sampling=sampling, model=model, chosen=typed, **columns)
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
