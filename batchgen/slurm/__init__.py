"""Slurm: the text of a job, what its batch process does, its commands, and what the run folder remembers of jobs."""

from batchgen.slurm.directives import Directive, parse
from batchgen.slurm.queue import GONE, SlurmError, Task, cancel, largest_array, sbatch, tasks
from batchgen.slurm.records import Job, end_of, jobs, log_pattern, prepare, remember
from batchgen.slurm.script import MAX_REQUEUES, SHARD, SRUN, Array, Script, ranges, retries, submitted
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
    "parse",
    "prepare",
    "ranges",
    "remember",
    "retries",
    "sbatch",
    "submitted",
    "tasks",
]
