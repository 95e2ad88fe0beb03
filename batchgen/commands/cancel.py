"""`batchgen cancel`: ends the Slurm jobs of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchgen.commands import CommandError, fail

if TYPE_CHECKING:
    from batchgen.slurm import Job, Task


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
        if not folder.is_dir():
            raise CommandError(f"there is no run folder {folder}")
        jobs = slurm.jobs(folder)
        if not jobs:
            raise CommandError(f"{folder} knows of no Slurm job. A run that was started by hand is stopped with Ctrl-C")
        tasks = _tasks(folder, jobs)
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


def _tasks(folder: Path, jobs: list[Job]) -> list[Task]:
    from batchgen import slurm

    try:
        return [task for job in jobs for task in slurm.tasks(job.number)]
    except slurm.SlurmError as error:
        numbers = ", ".join(job.number for job in jobs)
        raise CommandError(f"{error}. Nothing was cancelled: jobs of {folder} may be running ({numbers})") from error
