"""Slurm's own commands. Each may be missing, and none of them may keep us waiting."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from batchgen.types import UserError

_SECONDS = 60.0  # for a command; clients give up by themselves after ten seconds without a controller
_FIELDS = "%i|%F|%K|%T|%r|%N|%S|%e"  # of squeue: its --json differs from one version of Slurm to the next

GONE = "GONE"  # Slurm has answered, and knows the job no more
_UNKNOWN = "Invalid job id"  # how squeue says so; any other failure says nothing of the job
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
WORKING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")


class SlurmError(UserError):
    """Slurm cannot do what was asked: a sentence for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Task:
    """A job, or a task of a job array, as the queue knows it."""

    job: str  # the array's number for a task of one
    index: int | None  # in the array
    state: str  # Slurm's word, like RUNNING
    reason: str = ""  # why it waits
    nodes: str = ""
    start: str = ""  # when it began, or may begin
    end: str = ""  # when its time is over

    @property
    def name(self) -> str:
        """Slurm's name of it, like 12 or 12_3."""
        return self.job if self.index is None else f"{self.job}_{self.index}"

    @property
    def words(self) -> str:
        """Its state for a person."""
        if self.works:
            return f"{self.state} on {self.nodes}, since {self.start}, until {self.end}"
        why = f" ({self.reason})" if self.reason not in ("", "None") else ""
        return f"{self.state}{why}"

    @property
    def waits(self) -> bool:
        """It has not begun, or will begin again."""
        return self.state in WAITING

    @property
    def works(self) -> bool:
        """It has nodes."""
        return self.state in WORKING


def sbatch(script: Path, options: Sequence[str] = (), arguments: Sequence[str] = ()) -> str:
    """Submits `script`; gives the job's number.

    Raises:
        SlurmError: Slurm has refused it, in its own words, or is not there.
    """
    words = ["sbatch", "--parsable", *options, str(script.absolute()), *arguments]
    # "JOB" or "JOB;CLUSTER", after what a site's plugin may print.
    lines = _run_command(words, f"{script} is written, but was not submitted").split()
    if not lines or not re.match(r"\d+", lines[-1]):
        raise SlurmError(f"sbatch has not said which job it made of {script}: {' '.join(lines)!r}")
    return lines[-1].partition(";")[0]


def largest_array() -> int | None:
    """How many tasks an array may have here: indices are below MaxArraySize. None if nobody can be asked."""
    try:
        match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run_command(["scontrol", "show", "config"], ""), re.MULTILINE)
    except SlurmError:
        return None
    return int(match[1]) if match else None


def tasks(job: str) -> list[Task]:
    """The tasks of a job, one if it is no array: from the queue, else from the accounting, which few clusters lack.

    Raises:
        SlurmError: the queue cannot be read, and the accounting does not say: the job may be running.
    """
    text, unread = "", None
    try:
        text = _run_command(["squeue", "-h", "-r", "-t", "all", "-j", job, "-o", _FIELDS], "the queue cannot be read")
    except SlurmError as error:
        unread = None if _UNKNOWN in str(error) else error
    listed = [_task(line) for line in text.splitlines() if line.count("|") == _FIELDS.count("|")]
    listed = listed or _accounted(job)
    if not listed and unread is not None:
        raise unread
    return listed or [Task(job, None, GONE)]


def _task(line: str) -> Task:
    _, job, index, state, reason, nodes, start, end = line.split("|")
    return Task(job, int(index) if index.isdigit() else None, state, reason, nodes, start, end)


def _accounted(job: str) -> list[Task]:
    """What the accounting says; nothing if it does not know the job, or cannot be asked."""
    try:
        text = _run_command(["sacct", "-n", "-X", "-P", "-j", job, "-o", "JobID,State,NodeList,Start,End"], "")
    except SlurmError:
        return []
    listed = []
    for line in text.splitlines():
        number, state, nodes, start, end = line.split("|")
        _, _, index = number.partition("_")
        listed.append(Task(job, int(index) if index.isdigit() else None, state.split()[0], "", nodes, start, end))
    return listed


def requeue(job: str) -> None:
    """Asks Slurm to begin this job again; it ends the calling job meanwhile.

    Raises:
        SlurmError: scontrol is not there (a container), or Slurm refuses.
    """
    _run_command(["scontrol", "requeue", job], f"job {job} cannot be requeued")


def cancel(jobs: Sequence[str]) -> None:
    """Cancels jobs; those that have ended already are no error.

    Raises:
        SlurmError: Slurm refuses, or is not there.
    """
    _run_command(["scancel", "--quiet", *jobs], f"job {', '.join(jobs)} cannot be cancelled")


def _run_command(words: Sequence[str], what: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SlurmError(f"{what}: there is no {words[0]} here. Slurm's commands are on its login nodes") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{what}: {words[0]} has not answered for {_SECONDS:.0f} s") from None
    if done.returncode:
        message = " ".join((done.stderr or done.stdout).split())
        raise SlurmError(f"{what}: {message or f'{words[0]} ended with exit code {done.returncode}'}")
    return done.stdout
