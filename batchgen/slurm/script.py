"""The text of a job: the script that sbatch takes. `batchgen submit` and the files in jobs/ are both made here."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from batchgen.slurm.directives import Directive, merged
from batchgen.slurm.records import Job, log_pattern
from batchgen.slurm.site import Site

LEAD_SECONDS = 120  # from the warning to the time limit; Slurm looks at limits every half minute
MAX_REQUEUES = 100

# --kill-on-bad-exit: a dead rank must not leave the others waiting. --wait=0: ranks that end early must not have the
# others killed, whatever WaitTime the site has. Block: ranks of one tensor-parallel group follow each other, so that
# they are on one node.
SRUN = ("srun", "--kill-on-bad-exit=1", "--wait=0", "--distribution=block")

# Which of sbatch's options say how many tasks there are.
_TASKS = ("ntasks", "ntasks-per-node", "ntasks-per-gpu", "ntasks-per-socket")
_REQUEUE = ("requeue", "no-requeue")
SHARD = '"$((SLURM_ARRAY_TASK_ID + ${1:-0}))/%s"'  # in an array behind the first, $1 is the number of its first shard


@dataclass(frozen=True)
class Script:
    """A job's script; all but the directives is text of bash, quoted where it must be."""

    title: Sequence[str]  # comments
    directives: Sequence[Directive]
    setup: Sequence[str]  # lines before anything starts
    batchgen: str  # what calls batchgen
    supervise: Sequence[str]  # options of `batchgen job`
    srun: Sequence[str]
    command: Sequence[str]  # `run` and its words
    notes: Mapping[str, str] = field(default_factory=dict)  # by a directive's name: the comment behind it

    def text(self) -> str:
        """The whole script."""
        width = max((len(directive.line) for directive in self.directives if directive.name in self.notes), default=0)
        lines = ["#!/bin/bash", *(f"# {line}".rstrip() for line in self.title)]
        for directive in self.directives:
            note = self.notes.get(directive.name)
            lines.append(directive.line if note is None else f"{directive.line.ljust(width)}  # {note}")
        lines += ["", *self.setup, ""] if self.setup else [""]
        lines.append(f"exec {self.batchgen} job {' '.join([*self.supervise, '--'])} \\")
        lines.append(f"    {' '.join(self.srun)} \\")
        lines.append(f"    {self.batchgen} {' '.join(self.command)}")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Array:
    """How a run is spread over the tasks of job arrays; `shards` 0: over none."""

    shards: int = 0  # of the run
    size: int = 0  # tasks of one array, at most as many as the cluster allows
    at_once: int = 0  # most tasks that may run together; 0: any number

    def indices(self, offset: int = 0) -> str:
        """sbatch's --array for the shards from `offset` on."""
        last = min(self.size, self.shards - offset) - 1
        return f"0-{last}%{self.at_once}" if self.at_once else f"0-{last}"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as sbatch's --array has them: 3,7-9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def retries(jobs: Sequence[Job], shards: Sequence[int]) -> list[str]:
    """The commands that do `shards` again: one for each array that they were in."""
    offsets = {job.offset: job for job in jobs if job.shards}  # of arrays of the same shards, the newest
    lines = []
    for offset in sorted(offsets) or [0]:
        after = min((other for other in offsets if other > offset), default=None)
        indices = [shard - offset for shard in shards if shard >= offset and (after is None or shard < after)]
        if indices:
            job = offsets.get(offset)
            script = shlex.quote(job.script) if job is not None and job.script else "JOB.sbatch"
            lines.append(f"sbatch --array={ranges(indices)} {script}" + (f" {offset}" if offset else ""))
    return lines


@dataclass(frozen=True, slots=True)
class Requeue:
    """How a job that ends with open rows comes back."""

    max_requeues: int = MAX_REQUEUES  # times that it is requeued
    chained: bool = False  # more jobs follow by dependency, instead of this one being requeued


def make_script(
    run: Path,
    command: Sequence[str],
    typed: Sequence[Directive],
    site: Site,
    array: Array,
    requeue: Requeue = Requeue(),
) -> Script:
    """The script of `batchgen submit`, for the working folder and the interpreter of this process.

    Args:
        run: the run folder.
        command: words of `run …` or `run-batch …`, as typed.
        typed: options of sbatch; they come before the site's, and those before ours.
    """
    max_requeues = requeue.max_requeues
    given = [*site.directives, *typed]
    if [directive.name for directive in given if directive.name in _REQUEUE][-1:] == ["no-requeue"]:
        max_requeues = 0
    given = merged(directive for directive in given if directive.name not in _REQUEUE)
    ours = [
        Directive("job-name", run.absolute().name),
        Directive("chdir", str(Path.cwd())),
        Directive("output", log_pattern(run, array.shards > 0)),
        Directive("open-mode", "append"),
        Directive("no-requeue" if max_requeues == 0 else "requeue"),
        Directive("signal", f"B:USR2@{LEAD_SECONDS}"),
    ]
    if array.shards:
        ours.append(Directive("array", array.indices()))
    shard = ["--shard", SHARD % array.shards] if array.shards else []
    return Script(
        title=["Written by `batchgen submit`. It can be edited, and submitted again as it stands, with sbatch."],
        directives=merged(ours, given, _one_task_a_gpu(given)),
        setup=[*(f"module load {shlex.quote(module)}" for module in site.modules), *site.setup],
        batchgen=f"{shlex.quote(sys.executable)} -m batchgen",
        supervise=["--chained"] if requeue.chained else [f"--max-requeues={max_requeues}"],
        srun=[*SRUN, *map(shlex.quote, site.srun)],
        # Right behind `run`: what follows a `--` is input.
        command=[command[0], *shard, *map(shlex.quote, command[1:])],
    )


def _one_task_a_gpu(directives: Sequence[Directive]) -> list[Directive]:
    values = {directive.name: directive.value or "" for directive in directives}
    if any(name in values for name in _TASKS):
        return []
    for option, tasks in (("gpus-per-node", "ntasks-per-node"), ("gres", "ntasks-per-node"), ("gpus", "ntasks")):
        # A number, or [gpu:]TYPE:NUMBER.
        match = re.fullmatch(r"(?:gpu:|gpu(?=:))?(?:[^:,]+:)?(\d+)", values.get(option, ""))
        if match is not None and (option != "gres" or values[option].startswith("gpu")):
            return [Directive(tasks, match[1])]
    return []
