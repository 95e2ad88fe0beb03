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
@click.option("--json", "as_json", is_flag=True, help="Print every figure as JSON, for programs.")
@click.option(
    "--exit-code",
    is_flag=True,
    help="Exit with the code of `run`: 0 if all rows are good, 3 if some have failed, 75 if some are open.",
)
def command(run: str, as_json: bool, exit_code: bool) -> None:
    """Say how far a run is, from its files and from Slurm's queue.

    It is safe at any time and from any host, since it only reads. Of a run in shards it says which shards are missing,
    running or failed, and what does those again.
    """
    from batchgen import slurm
    from batchgen.checkpoint import RunFolder, status
    from batchgen.types import UserError

    folder = Path(run)
    try:
        jobs = slurm.jobs(folder)
        queued, unread = _queue(jobs)
        has_begun = (folder / "run.json").exists() or not jobs  # a job may wait for hours before it makes that file
        state = status(RunFolder(folder)) if has_begun else None
    except (UserError, OSError) as error:
        raise fail(error) from error
    if as_json:
        values = {} if state is None else {**dataclasses.asdict(state), "exit_code": state.exit_code}
        values |= {"folder": str(folder), "jobs": [dataclasses.asdict(task) for _, task in queued]}
        values["queue_error"] = unread
        values["shard"] = None if state is None else str(state.shard)
        click.echo(json.dumps(values, indent=1))
    else:
        click.echo("\n".join([*_lines(folder, state), *_of_slurm(folder, jobs, queued, unread, state)]))
    sys.exit((ExitCode.RESUMABLE if state is None else state.exit_code) if exit_code else 0)


def _lines(folder: Path, run: Status | None) -> Iterator[str]:
    from batchgen.runs.progress import duration

    if run is None:
        yield f"{folder}: no job of it has begun"
        return
    yield f"{run.folder}: {run.state}"
    yield f"  rows    {run.good} good, {run.failed} failed, {run.open} open, of {run.rows}"
    yield f"  tokens  {run.generated_tokens:,} generated from {run.prompt_tokens:,} in {run.batches} batches"
    if run.reasoning_tokens:
        yield f"  thought {run.reasoning_tokens:,} of the generated tokens are the model's thinking"
    if run.incomplete:
        yield f"  cut     {run.incomplete:,} rows, before their text was all that its constraint demands"
    if run.tokens_per_second:
        last = "now" if run.state == "running" else "in the last attempt"
        yield f"  speed   {run.tokens_per_second:,.0f} tokens/s {last}"
    if run.eta_seconds is not None:
        yield f"  left    about {duration(run.eta_seconds)}"
    if not run.open and not run.merged:
        yield f"  all rows are done, but not merged: batchgen merge {run.folder}"
    if len(run.attempts) > _SHOWN:
        yield f"  {len(run.attempts) - _SHOWN} earlier attempts, and then"
    for attempt in run.attempts[-_SHOWN:]:
        how = attempt.ended or ("works" if attempt.live else "died")
        lost = f", {attempt.lost_tokens:,} tokens lost" if attempt.lost_tokens and not attempt.live else ""
        shard = "" if attempt.shard == "0/1" else f"shard {attempt.shard}, "
        yield f"  {attempt.where}, {shard}{attempt.ranks} rank(s): {how}{lost}"


def _queue(jobs: list[Job]) -> tuple[list[tuple[Job, Task]], str | None]:
    """What Slurm says of the jobs, or why it says nothing: a run folder is also read where there is no Slurm."""
    from batchgen import slurm

    try:
        return [(job, task) for job in jobs for task in slurm.tasks(job.number)], None
    except slurm.SlurmError as error:
        return [], str(error)


def _of_slurm(
    folder: Path, jobs: list[Job], queued: list[tuple[Job, Task]], unread: str | None, run: Status | None
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
    shards = list(run.shards) if run is not None else []
    shards = shards or ["missing"] * max((job.shards for job in jobs), default=0)
    if not shards:
        return
    in_queue = [(job, task) for job, task in queued if task.works or task.waits]
    busy = {job.offset + task.index for job, task in in_queue if task.index is not None}
    # A task that may run must not be submitted again. In the accounting, those that wait have no index of their own.
    unsure = unread is not None or any(task.index is None for job, task in in_queue if job.shards)
    for state in ("missing", "running", "failed"):
        which = [index for index, shard in enumerate(shards) if shard == state]
        if which:
            yield f"  {state:7} shards {slurm.ranges(which)} of {len(shards)}"
    retried = [index for index, shard in enumerate(shards) if shard in ("missing", "failed") and index not in busy]
    if retried and not any(job.shards for job in jobs):  # the shards were started by hand
        yield f"  again   the same command, with --shard I/{len(shards)} for each I of {slurm.ranges(retried)}"
    elif retried and not unsure:
        yield from (f"  again   {line}" for line in slurm.retries(jobs, retried))
