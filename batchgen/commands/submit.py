"""`batchgen submit`: a run as a Slurm job."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchgen.commands import CommandError, fail, parse_run_command
from batchgen.slurm import MAX_REQUEUES

if TYPE_CHECKING:
    from batchgen.slurm import Array, Script


class _Submit(click.Command):
    """What stands before `--` belongs to sbatch and to us, what stands behind it to `batchgen run`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.obj = args[at + 1 :]
        return super().parse_args(ctx, ["--help" if word == "-h" else word for word in args[:at]])


def _array(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:%(\d+))?", "0" if text is None else text, re.ASCII)
    if match is None or (text is not None and int(match[1]) < 2):
        raise click.BadParameter("must be the number of shards, 2 or more, like 8, or 8%4 for at most 4 at a time")
    return int(match[1]), int(match[2] or 0)


# Click would see -h in sbatch's -Ahpc, too; as a word of its own it is dealt with above.
@click.command(
    "submit", cls=_Submit, context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]}
)
@click.option("--print", "only_print", is_flag=True, help="Print the script; write no file and submit no job.")
@click.option(
    "--array",
    metavar="N[%M]",
    callback=_array,
    help="Submit N jobs side by side, one for each shard; at most M run at a time.",
)
@click.option(
    "--chain",
    type=click.IntRange(min=2),
    metavar="N",
    help="Submit N jobs that run one after the other; none is requeued.",
)
@click.option(
    "--max-requeues",
    type=click.IntRange(min=0),
    default=MAX_REQUEUES,
    show_default=True,
    help="How often the job may begin again.",
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[SBATCH OPTIONS] -- run …")
@click.pass_context
def command(
    context: click.Context,
    options: tuple[str, ...],
    only_print: bool,
    array: tuple[int, int],
    chain: int | None,
    max_requeues: int,
) -> None:
    """Write the Slurm job of a run, and submit it; print its number.

    Options of sbatch come first, then --, then the command: batchgen submit --gpus-per-node=4 --time=4:00:00 -- run
    prompts.jsonl -o out. The script is out.sbatch, beside the run folder. The job begins again by itself after its time
    limit, a preemption or a lost node, until no row is open. The defaults of a site stand in
    ~/.config/batchgen/slurm.toml.

    --chain is for clusters where a job cannot requeue itself, since `scontrol` is not in its container.
    """
    from batchgen import slurm
    from batchgen.types import WHOLE, UserError

    folder, run_options = parse_run_command(context.obj)
    shards, at_once = array
    if any(word.partition("=")[0] == "--dry-run" for word in options):
        raise CommandError("submit has no --dry-run: --print prints the script, and submits nothing")
    if run_options.get("dry_run"):
        raise CommandError(
            "--dry-run generates nothing, so that no job is needed: leave it out, or call `batchgen run --dry-run` here"
        )
    if shards and "shard" not in run_options:
        raise CommandError("--array splits a run into shards, which `run` knows and `run-batch` does not")
    if shards and run_options.get("shard", WHOLE) != WHOLE:
        raise CommandError("--array gives each job its --shard: leave that one out")
    try:
        size = min(shards, slurm.largest_array() or shards) if shards else 0
        site = slurm.load(os.environ, Path.cwd())
        given = slurm.parse(options)
        tasks = slurm.Array(shards, size, at_once)
        requeue = slurm.Requeue(max_requeues, chained=chain is not None)
        script = slurm.make_script(folder, context.obj, given, site, tasks, requeue)
        _check_there(run_options)
        if only_print:
            click.echo(_bytes(script), nl=False)
            return
        jobs = _submit(folder, script, tasks, chain or 1)
    except UserError as error:
        raise fail(error) from error
    for job in jobs:
        click.echo(job)


def _check_there(run_options: dict[str, Any]) -> None:
    """Whether what `run` or `run-batch` is given by these options is on this machine, as far as it is files."""
    from batchgen import models
    from batchgen.commands.run_batch import model_of
    from batchgen.runs.prepare import check_there
    from batchgen.runs.transfer import is_url

    adapter, adapters = run_options["adapter"]
    if "inputs" in run_options:
        check_there(run_options["inputs"], run_options["model"], adapter, adapters)
    elif is_url(run_options["input_file"]):  # fetched when the job begins
        models.check_there(model_of(run_options), adapter, adapters)
    else:
        check_there([run_options["input_file"]], model_of(run_options), adapter, adapters, lines=True)


def _submit(folder: Path, script: Script, array: Array, links: int) -> list[str]:
    """Writes the script and submits it as often as it takes; the numbers of the jobs."""
    from batchgen import slurm

    path = folder.absolute().with_name(f"{folder.absolute().name}.sbatch")
    _write(path, _bytes(script))
    slurm.prepare(folder)
    made: list[str] = []
    for offset in range(0, array.shards, array.size) if array.shards else [0]:
        chain: list[str] = []
        for _ in range(links):
            options = [f"--array={array.indices(offset)}"] if array.shards else []
            if made and not chain and array.at_once:
                # Slurm counts what runs at once in one array alone: the next begins when the one before has ended.
                options += [f"--dependency=afterany:{made[-1]}", "--kill-on-invalid-dep=yes"]
            if chain:
                # A job that did all there was to do ends well, and those that follow it leave the queue: all of them
                # wait for it, since to leave the queue is not to end well. Of an array, some tasks may be done.
                after = f"afterany:{chain[-1]}" if array.shards else f"afternotok:{':'.join(chain)}"
                options += [f"--dependency={after}", "--kill-on-invalid-dep=yes"]
            chain.append(slurm.sbatch(path, options, [str(offset)] if offset else []))
            slurm.remember(folder, slurm.Job(chain[-1], time.time(), str(path), array.shards, offset))
        made += chain
    log = folder / "jobs" / (f"{made[0]}_INDEX.out" if array.shards else f"{made[0]}.out")
    click.echo(f"batchgen: submitted {path}; its output goes to {log}", err=True)
    click.echo(f"batchgen: how far it is: batchgen status {shlex.quote(str(folder))}", err=True)
    return made


def _bytes(script: Script) -> bytes:
    """Its text as in a file: a path's bytes are those of the folder or file, be they UTF-8 or not."""
    return script.text().encode("utf-8", "surrogateescape")


def _write(path: Path, text: bytes) -> None:
    """The script at `path`; one that says something else, edited perhaps, is kept beside it."""
    from batchgen.files import write_atomic

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_bytes() != text:
            endings = itertools.chain([""], itertools.count(2))
            kept = next(old for end in endings if not (old := path.with_name(f"{path.name}.old{end}")).exists())
            os.replace(path, kept)
            click.echo(f"batchgen: the script that was there is now {kept.name}", err=True)
        write_atomic(path, text)  # never through a link that somebody has put there
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
