"""`batchgen cancel`: ends the Slurm jobs of a run."""

from __future__ import annotations

from pathlib import Path

import click

from batchgen.commands import CommandError, fail


@click.command("cancel")
@click.argument("run", metavar="RUN")
def command(run: str) -> None:
    """Cancel the Slurm jobs of a run; what is finished stays.

    The ranks record what is finished before they end. The numbers of the jobs are printed; the same `submit` goes on.
    """
    from batchgen import slurm
    from batchgen.types import UserError

    folder = Path(run)
    try:
        known = slurm.jobs(folder)
        if not known:
            raise CommandError(f"{folder} knows of no Slurm job. A run that was started by hand is stopped with Ctrl-C")
        tasks = [task for job in known for task in slurm.tasks(job.number)]
        # Those that follow in a chain first, or they would begin as soon as the one before them ends.
        ends = list(dict.fromkeys(task.job for task in reversed(tasks) if task.works or task.waits))
        if not ends:
            click.echo(f"batchgen: no job of {folder} is in the queue", err=True)
            return
        slurm.cancel(ends)
    except UserError as error:
        raise fail(error) from error
    for job in ends:
        click.echo(job)
