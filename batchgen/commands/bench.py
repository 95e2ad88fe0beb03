"""`batchgen bench`: what engines can do with a model on this machine."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchgen.commands import CommandError, fail, log_to_stderr, results_only_on_stdout
from batchgen.commands._print import print_path
from batchgen.redaction import redact
from batchgen.types import ExitCode

if TYPE_CHECKING:
    from collections.abc import Sequence

_BATCHES = "1,8,16,32,64,128,256,512"  # the columns of the article's table
_MIXED_PROMPT, _MIXED_NEW = (32, 512), (16, 512)  # tokens, the fewest and the most


def _numbers(context: click.Context, parameter: click.Parameter, text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",") if part})
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise click.BadParameter("must be whole numbers with commas between them, like 1,8,64")
    return numbers


_count_mode = click.option(
    "--count-mode",
    type=click.Choice(["generated", "seed"]),
    default="generated",
    show_default=True,
    help="Which tokens count: those up to a row's end, or, as in the article (seed), the padding after it, too.",
)


@click.group("bench", invoke_without_command=True)
@click.option(
    "-o", "--out", default="bench", show_default=True, metavar="FOLDER", help="The folder where the results are kept."
)
@click.option(
    "--engines",
    default="accelerate",
    show_default=True,
    metavar="E,…",
    help="The engines to measure, with their settings, like accelerate,paged or accelerate:dtype=int8.",
)
@click.option("--model", metavar="MODEL", help="The model, as for `run`.")
@click.option(
    "--random-weights",
    metavar="SHAPE",
    help="Measure a model of random weights instead of --model; SHAPE is a config.json or the name of a shape.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="The number type of the weights; for random weights, auto is bfloat16.",
)
@click.option(
    "--batch-sizes",
    default=_BATCHES,
    show_default=True,
    callback=_numbers,
    metavar="N,…",
    help="The batch sizes of the article's table.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="How many new tokens each row of the table has; the rows of a workload have numbers of their own.",
)
@click.option(
    "--cycles",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="How often a cell is timed; a workload is not timed again after a minute.",
)
@click.option(
    "--mixed",
    default="",
    callback=_numbers,
    metavar="ROWS,…",
    help="Measure workloads of this many rows of unequal lengths, too: prompts of "
    f"{_MIXED_PROMPT[0]} to {_MIXED_PROMPT[1]} tokens, and {_MIXED_NEW[0]} to {_MIXED_NEW[1]} new ones.",
)
@click.option("--input", "input_file", metavar="INPUT", help="Measure a workload of your own prompts, too.")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    metavar="ROWS",
    help="How many rows of the input are taken; they are drawn once and for all.",
)
@_count_mode
@click.option(
    "--ranks",
    "--gpus",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many processes to start, one for each GPU.",
)
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Measure engines on this machine, by an article's table and by workloads of unequal lengths.

    The article is "Incredibly Fast BLOOM Inference with DeepSpeed and Accelerate". Its table has the milliseconds of a
    token by batch size: eight short sentences are repeated up to the batch size and continued greedily, and the time of
    tokenising and decoding is included. Here it also has the seconds until the model is loaded, the memory, and the
    share of what the machine allows at most.

    The results are kept, and the same command goes on with what is missing; an engine, a batch size or a number of
    ranks may be added. The path of the tables is printed. The shapes with a name are bloom-560m, bloom-7b1, bloom-176b,
    llama-8b, llama-70b, qwen3-0.6b, qwen3-30b-a3b, mixtral-8x7b, gpt-oss-20b, gemma3-12b and deepseek-v2-lite.
    """
    if context.invoked_subcommand is not None:
        return
    from batchgen.bench import tables
    from batchgen.bench.results import Folder
    from batchgen.runs.stop import Stop
    from batchgen.types import UserError

    log_to_stderr(0, 1)
    is_typed = context.get_parameter_source("tokens") is click.core.ParameterSource.COMMANDLINE
    if is_typed and (options["mixed"] or options["input_file"]):
        own = f"{_MIXED_NEW[0]} to {_MIXED_NEW[1]} new tokens" if options["mixed"] else "as many as it asks for"
        click.echo(f"batchgen: --tokens is for the article's table alone: each row of the workload has {own}", err=True)
    folder, stop = Folder(Path(options["out"])), Stop()
    try:
        with results_only_on_stdout(), stop.on_signals():
            _measure(folder, stop, options)
            path = tables.write(folder, options["count_mode"])
    except UserError as error:
        raise fail(error) from error
    print_path(path)
    sys.exit(ExitCode.RESUMABLE if stop() else ExitCode.ALL_GOOD)


def _measure(folder: Any, stop: Any, options: dict[str, Any]) -> None:
    from batchgen import bench, engines, models
    from batchgen.runs.manifest import versions

    if options["model"] is not None and options["random_weights"] is not None:
        raise CommandError("--model and --random-weights name two models; leave one of them out")
    systems = [bench.System.parse(text) for text in options["engines"].split(",")]
    dtype = options["dtype"]
    if options["random_weights"] is not None and dtype == "auto":
        dtype = "bfloat16"
    for system in systems:
        engines.check_dtype(engines.find(system.engine), system.dtype or dtype)
    cache = models.cache_folder(os.environ)
    with tempfile.TemporaryDirectory(prefix="batchgen-shape-") as scratch:
        model, name = _model(options, dtype, Path(scratch))
        jobs = _jobs(options, model, systems)
        measured = bench.Bench(
            systems,
            str(model),
            dtype,
            options["batch_sizes"],
            options["tokens"],
            options["cycles"],
            jobs,
            options["ranks"],
            str(cache),
            redact(shlex.join(["batchgen", *sys.argv[1:]]), os.environ),
            {"versions": versions(), "date": time.strftime("%Y-%m-%d")},
        )
        folder.check_or_create(bench.identity(measured, name))
        bench.run(measured, folder, os.environ, stop)


def _model(options: dict[str, Any], dtype: str, scratch: Path) -> tuple[Path, str]:
    """The model's folder, and what it is."""
    from batchgen import models

    if options["random_weights"] is None:
        models.check_there(options["model"])
        resolved = models.resolve(options["model"], models.cache_folder(os.environ), lambda sentence: None)
        return resolved.folder, resolved.name
    import torch

    from batchgen.models import shapes
    from batchgen.models.loading import FLOATING

    if dtype not in FLOATING:
        raise CommandError(
            f"random weights are {', '.join(FLOATING)}; an engine rounds them further with :dtype={dtype}"
        )
    shape = options["random_weights"]
    return shapes.make(shape, getattr(torch, dtype), scratch / "model"), f"random weights of {shape}"


def _jobs(options: dict[str, Any], model: Path, systems: Sequence[Any]) -> list[Any]:
    """The workloads of unequal lengths."""
    from batchgen import engines
    from batchgen.bench import Job, workloads
    from batchgen.bench.results import job_name

    if options["mixed"] and options["input_file"]:
        raise CommandError("--mixed and --input name different workloads; leave one of them out")
    tokenizer = engines.find(systems[0].engine).tokenizer(str(model))
    drawn = []
    for count in options["mixed"]:
        prompts = workloads.mixed(count, tokenizer.vocabulary or 32_000, _MIXED_PROMPT, _MIXED_NEW)
        drawn.append(("mixed", prompts))
    if options["input_file"]:
        from batchgen.requests.recipe import Recipe
        from batchgen.runs.prepare import sample

        prompts, _, _ = sample([options["input_file"]], Recipe(), tokenizer, options["sample"])
        if not prompts:
            raise CommandError(f"no row of {options['input_file']} can become a prompt")
        drawn.append((Path(options["input_file"]).name, prompts))
    rows = [(name, [(prompt.tokens, prompt.params.max_new_tokens) for prompt in prompts]) for name, prompts in drawn]
    return [Job(job_name(name, lengths), lengths) for name, lengths in rows]


@command.command("show")
@click.argument("folder", metavar="FOLDER")
@_count_mode
def show(folder: str, count_mode: Any) -> None:
    """Print the tables of a bench, and write them again."""
    from batchgen.bench import tables
    from batchgen.bench.results import Folder
    from batchgen.types import UserError

    try:
        path = tables.write(Folder(Path(folder)), count_mode)
    except UserError as error:
        raise fail(error) from error
    click.echo(path.read_text(encoding="utf-8"), nl=False)


@command.command("compare")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@_count_mode
def compare(first: str, second: str, count_mode: Any) -> None:
    """Compare two benches cell by cell.

    The table has the tokens per second of A and of B, and how many times faster B is.
    """
    from batchgen.bench import tables
    from batchgen.bench.results import Folder
    from batchgen.types import UserError

    folders = Folder(Path(first)), Folder(Path(second))
    try:
        for folder in folders:
            folder.read_manifest()
        click.echo(tables.compare(*folders, count_mode))
    except UserError as error:
        raise fail(error) from error


@command.command("worker", hidden=True)
@click.argument("task", metavar="TASK")
def worker(task: str) -> None:
    """One rank of a bench; `bench` starts it."""
    from batchgen.bench.worker import Task, Worker
    from batchgen.engine import Died, OutOfStep
    from batchgen.runs import launcher
    from batchgen.types import UserError
    from batchgen.world import from_environment

    world = from_environment(os.environ)
    launcher.die_with(int(os.environ["BATCHGEN_STARTER"]))
    log_to_stderr(world.rank, world.size)
    try:
        Worker(Task.read(Path(task)), world).work()
    except Died as error:
        click.echo(f"batchgen: {error}", err=True)
        sys.exit(ExitCode.RESUMABLE if isinstance(error, OutOfStep) else 1)
    except UserError as error:
        raise fail(error) from error
