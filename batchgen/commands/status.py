"""`batchgen status`: how far a run is, from its files and from Slurm's queue."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchgen.commands import fail
from batchgen.types import ExitCode

if TYPE_CHECKING:
    from batchgen.checkpoint import Status
    from batchgen.slurm import Job, Task


_SHOWN = 10  # attempts that a person wants to see


@click.command("status")
@click.argument("run", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="For programs: every figure.")
@click.option("--exit-code", is_flag=True, help="Exit as `run` would: 0 good, 3 some rows failed, 75 rows are open.")
def command(run: str, as_json: bool, exit_code: bool) -> None:
    """Say how far a run is, from its files and from Slurm's queue.

    Safe at any time and from any host: it only reads. Of a job array it says which shards are missing, running or
    failed, and, where the queue can be read, the command that does those again.
    """
    from batchgen import slurm
    from batchgen.checkpoint import RunFolder, status
    from batchgen.types import UserError

    folder = Path(run)
    try:
        jobs = slurm.jobs(folder)
        queued, unread = _queue(jobs)
        begun = (folder / "run.json").exists() or not jobs  # a job may wait for hours before it makes that file
        found = status(RunFolder(folder)) if begun else None
    except (UserError, OSError) as error:
        raise fail(error) from error
    if as_json:
        values = {} if found is None else {**dataclasses.asdict(found), "exit_code": found.exit_code}
        values |= {"folder": str(folder), "jobs": [dataclasses.asdict(task) for _, task in queued]}
        values["queue_error"] = unread
        values["shard"] = None if found is None else str(found.shard)
        click.echo(json.dumps(values, indent=1))
    else:
        click.echo("\n".join([*_lines(folder, found), *_of_slurm(folder, jobs, queued, unread, found)]))
    sys.exit((ExitCode.RESUMABLE if found is None else found.exit_code) if exit_code else 0)


def _lines(folder: Path, found: Status | None) -> Iterator[str]:
    from batchgen.runs.progress import duration

    if found is None:
        yield f"{folder}: no job of it has begun"
        return
    yield f"{found.folder}: {found.state}"
    yield f"  rows    {found.good} good, {found.failed} failed, {found.open} open, of {found.rows}"
    yield f"  tokens  {found.generated_tokens:,} generated from {found.prompt_tokens:,} in {found.batches} batches"
    if found.tokens_per_second:
        last = "now" if found.state == "running" else "in the last attempt"
        yield f"  speed   {found.tokens_per_second:,.0f} tokens/s {last}"
    if found.eta_seconds is not None:
        yield f"  left    about {duration(found.eta_seconds)}"
    if not found.open and not found.merged:
        yield f"  all rows are done, but not merged: batchgen merge {found.folder}"
    if len(found.attempts) > _SHOWN:
        yield f"  {len(found.attempts) - _SHOWN} earlier attempts, and then"
    for attempt in found.attempts[-_SHOWN:]:
        state = attempt.ended or ("works" if attempt.live else "died")
        lost = f", {attempt.lost_tokens:,} tokens lost" if attempt.lost_tokens and not attempt.live else ""
        shard = "" if attempt.shard == "0/1" else f"shard {attempt.shard}, "
        yield f"  {attempt.where}, {shard}{attempt.ranks} rank(s): {state}{lost}"


def _queue(jobs: list[Job]) -> tuple[list[tuple[Job, Task]], str | None]:
    """What Slurm says of the jobs, or why it says nothing: a run folder is also read where there is no Slurm."""
    from batchgen import slurm

    try:
        return [(job, task) for job in jobs for task in slurm.tasks(job.number)], None
    except slurm.SlurmError as error:
        return [], str(error)


def _of_slurm(
    folder: Path, jobs: list[Job], queued: list[tuple[Job, Task]], unread: str | None, found: Status | None
) -> Iterator[str]:
    """The jobs that are in the queue or have given up, and what is to be done about shards."""
    from batchgen import slurm

    if unread is not None:
        yield f"  jobs    {', '.join(job.number for job in jobs)}: {unread}"
    for job, task in queued:
        if task.works or task.waits:
            yield f"  job     {task.name}: {task.words}"
        elif (end := slurm.end_of(folder, task.name)) is not None:
            yield f"  job     {task.name}: {end[0]}: {end[1]}"
        elif job is jobs[-1] and task.state not in ("COMPLETED", slurm.GONE):
            yield f"  job     {task.name}: {task.state}"
    shards = list(found.shards) if found is not None else []
    shards = shards or ["missing"] * max((job.shards for job in jobs), default=0)
    if not shards:
        return
    in_queue = [(job, task) for job, task in queued if task.works or task.waits]
    busy = {job.offset + task.index for job, task in in_queue if task.index is not None}
    # A task that may run must not be submitted again. In the accounting, those that wait have no index of their own.
    unsure = unread is not None or any(task.index is None for job, task in in_queue if job.shards)
    for state in ("missing", "running", "failed"):
        which = [index for index, one in enumerate(shards) if one == state]
        if which:
            yield f"  {state:7} shards {slurm.ranges(which)} of {len(shards)}"
    again = [index for index, one in enumerate(shards) if one in ("missing", "failed") and index not in busy]
    if again and not unsure:
        yield from (f"  again   {line}" for line in slurm.retries(jobs, again))
