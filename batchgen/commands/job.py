"""`batchgen job`: the batch process of a Slurm job."""

from __future__ import annotations

import os
import sys
from pathlib import PurePath

import click

from batchgen.commands import CommandError, fail, log_to_stderr, parse_run_command
from batchgen.slurm import MAX_REQUEUES


@click.command("job", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--max-requeues",
    type=click.IntRange(min=0),
    default=MAX_REQUEUES,
    show_default=True,
    help="How often the job may begin again.",
)
@click.option(
    "--chained",
    is_flag=True,
    help="Other jobs follow by dependency: do not requeue this one, and end well if all is done.",
)
@click.argument("words", nargs=-1, required=True, metavar="-- COMMAND…")
def command(words: tuple[str, ...], max_requeues: int, chained: bool) -> None:
    """Carry a command out as the batch process of a Slurm job, requeued until it is done.

    COMMAND is `srun … batchgen run …`. At Slurm's warning (--signal=B:USR2@120) the ranks record what is finished and
    end, and the job is requeued. It is not requeued if no row is open, if this start has finished no row, or if
    it was requeued too often.

    The exit codes are those of `run`; 4 also means that another start would not help.
    """
    from batchgen.slurm import Supervisor
    from batchgen.types import WHOLE, UserError

    log_to_stderr(0, 1)
    calls = (n for n in range(1, len(words)) if words[n] in ("run", "run-batch") and _is_batchgen(words[n - 1]))
    run = next(calls, None)
    if run is None:
        raise CommandError("the command must call batchgen: srun … batchgen run …")
    try:
        folder, options = parse_run_command(words[run:])
        code = Supervisor(folder, options.get("shard", WHOLE), os.environ, max_requeues, chained).carry_out(words)
    except UserError as error:
        raise fail(error) from error
    sys.exit(code)


def _is_batchgen(word: str) -> bool:
    return PurePath(word).name == "batchgen"
