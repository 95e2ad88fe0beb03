"""Slurm: the text of a job, what its batch process does, its commands, and what the run folder remembers of jobs."""

from batchgen.slurm.directives import Directive, parse
from batchgen.slurm.queue import GONE, SlurmError, Task, cancel, largest_array, sbatch, tasks
from batchgen.slurm.records import Job, end_of, jobs, log_pattern, prepare, remember
from batchgen.slurm.script import MAX_REQUEUES, SHARD, SRUN, Array, Requeue, Script, make_script, ranges, retries
from batchgen.slurm.site import Site, load
from batchgen.slurm.supervise import Supervisor

__all__ = [
    "GONE",
    "MAX_REQUEUES",
    "SHARD",
    "SRUN",
    "Array",
    "Directive",
    "Job",
    "Requeue",
    "Script",
    "Site",
    "SlurmError",
    "Supervisor",
    "Task",
    "cancel",
    "end_of",
    "jobs",
    "largest_array",
    "load",
    "log_pattern",
    "make_script",
    "parse",
    "prepare",
    "ranges",
    "remember",
    "retries",
    "sbatch",
    "tasks",
]
