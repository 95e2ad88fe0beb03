"""What the batch process of a job does: starts the ranks, hears Slurm's warning, and has the job begin again.

The warning (USR2, ahead of the time limit) reaches this process alone. Passed on to srun it reaches every rank, which
records what is finished and ends; then the job is requeued, unless nothing is open, or another start would not help.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from batchgen.checkpoint import RunFolder, Status, status
from batchgen.slurm.directives import WARNINGS
from batchgen.slurm.queue import SlurmError, requeue
from batchgen.slurm.records import GAVE_UP, Job, end_of, is_unwritten, jobs, note_end, note_unwritten, remember
from batchgen.types import TOO_MANY_FAILED, WHOLE, ExitCode, Shard

logger = logging.getLogger(__name__)

GRACE_SECONDS = 60.0  # for the ranks to end after the warning; then the job is requeued all the same
_AGAIN_SECONDS = 5.0  # a rank that is just starting does not hear the first one
# Preemption, a lost node, scancel: Slurm decides what comes next.
_ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class Supervisor:
    """One start of a job."""

    run: Path
    shard: Shard
    environment: Mapping[str, str]
    max_requeues: int
    chained: bool  # other jobs follow this one by dependency
    grace: float = GRACE_SECONDS

    def __post_init__(self) -> None:
        self._warned_at: float | None = None
        self._ended = False  # Slurm ends this job
        self._child: subprocess.Popen[bytes] | None = None
        environment = self.environment
        array, index = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        self._job = array or environment.get("SLURM_JOB_ID", "")
        self._task = f"{array}_{index}" if array else self._job
        self._restarts = int(environment.get("SLURM_RESTART_COUNT") or 0)

    def carry_out(self, words: Sequence[str]) -> int:
        """Runs the command `words` to its end; the exit code of the job."""
        for number in (*WARNINGS, *_ENDINGS):
            signal.signal(number, self._hear)
        if self._job:
            shards = self.shard.count if self._task != self._job else 0
            remember(self.run, Job(self._job, time.time(), shards=shards, offset=self._offset() if shards else 0))
        before, limits = self._status(), self._limits()
        why_not = self._why_not(before)
        if why_not is not None:
            return why_not
        code = self._wait(words)
        return self._concluded(before, self._status(), code, learnt=self._limits() > limits)

    def _offset(self) -> int:
        return self.shard.index - int(self.environment.get("SLURM_ARRAY_TASK_ID") or 0)

    def _status(self) -> Status | None:
        """How far the run is; None if it has not begun."""
        folder = RunFolder(self.run)
        return status(folder, self.shard) if folder.has_manifest() else None

    def _limits(self) -> int:
        """How many sizes of batches have been found too large."""
        return len(list(self.run.glob("limits-*.json")))

    def _why_not(self, before: Status | None) -> int | None:
        """The exit code, if this start of the job has nothing to do."""
        predecessor = self._predecessor()
        is_restart = self._restarts > 0 or predecessor is not None
        written = not is_unwritten(self.run, predecessor or self._task)
        if is_restart and written and before is not None and before.exit_code != ExitCode.RESUMABLE:
            logger.info("the run is finished; nothing is left to do")
            return self._code_of(before)
        last = end_of(self.run, predecessor) if predecessor else None
        if last is not None and last[0] == GAVE_UP:
            return self._give_up(last[1])
        if self._restarts > self.max_requeues:
            return self._give_up(f"job {self._task} has been requeued {self._restarts} times, more than it may be")
        return None

    def _predecessor(self) -> str | None:
        """The job that this one follows in a chain."""
        dependency = self.environment.get("SLURM_JOB_DEPENDENCY", "") if self.chained else ""
        job = dependency.rpartition(":")[2].partition("_")[0].partition("(")[0]
        if not job.isdigit():
            return None
        if self._task == self._job:
            return job
        # Of several arrays, the first of a chain may wait for one of other shards.
        others = (other.number for other in jobs(self.run) if other.offset != self._offset())
        return None if job in others else f"{job}_{self.environment['SLURM_ARRAY_TASK_ID']}"

    def _wait(self, words: Sequence[str]) -> int:
        """The exit code of the command, negative for a signal."""
        variables = dict(self.environment)
        if "SLURM_CPUS_PER_TASK" in variables:  # since Slurm 22.05 a step does not get it by itself
            variables.setdefault("SRUN_CPUS_PER_TASK", variables["SLURM_CPUS_PER_TASK"])
        try:
            self._child = subprocess.Popen(words, env=variables, stdin=subprocess.DEVNULL)
        except OSError as error:
            logger.error("cannot start %s: %s", words[0], error.strerror or error)
            return ExitCode.CANNOT_RUN
        if self._warned_at is not None:
            self._child.send_signal(signal.SIGUSR2)
        while True:
            with suppress(subprocess.TimeoutExpired):
                return self._child.wait(timeout=_AGAIN_SECONDS)
            if self._warned_at is not None:
                self._child.send_signal(signal.SIGUSR2)
            if self._warned_at is not None and time.monotonic() - self._warned_at > self.grace and not self._ended:
                logger.warning("the ranks have not ended in %.0f s; what is finished is recorded", self.grace)
                return ExitCode.RESUMABLE

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number in _ENDINGS:
            self._ended = True  # Slurm tells the tasks itself
        elif self._warned_at is None:
            self._warned_at = time.monotonic()
            if self._child is not None and self._child.returncode is None:
                self._child.send_signal(signal.SIGUSR2)

    def _concluded(self, before: Status | None, after: Status | None, code: int, *, learnt: bool) -> int:
        """What comes next, after a start that has ended with `code`.

        Args:
            learnt: it has found that a batch was too large.
        """
        if after is not None and after.exit_code != ExitCode.RESUMABLE and code != ExitCode.RESUMABLE:
            note_unwritten(self.run, self._task, unwritten=False)
            _log_progress(after)
            return self._code_of(after)
        if self._ended:
            logger.info("Slurm has ended this start, which was not done")
            return ExitCode.RESUMABLE
        if code == ExitCode.CANNOT_RUN:
            return self._give_up("it could not run, and says why above")
        if after is not None and not after.open:
            return self._not_written(before)
        last = (after.attempts[-1].ended or "") if after is not None and after.attempts else ""
        if TOO_MANY_FAILED in last:
            return self._give_up(last)
        if after is None or (not learnt and before is not None and after.open >= before.open):
            return self._give_up(
                "this start has finished no row, so that another one would not either. See why above; if the time was "
                "too short for one batch, ask for more with --time, or for smaller ones with --batch-size"
            )
        if learnt:
            logger.info("batches of that size do not fit; the next start makes smaller ones")
        _log_progress(after)
        return self._goes_on()

    def _not_written(self, before: Status | None) -> int:
        """All rows are done; the files that are made of them, or their delivery, are not."""
        if before is not None and not before.open and self._warned_at is None:  # else the time was too short
            return self._give_up("every row is done, but the answers could not be written; it says why above")
        note_unwritten(self.run, self._task, unwritten=True)
        logger.info("every row is done, but the answers are not written yet")
        return self._goes_on()

    def _goes_on(self) -> int:
        if self.chained:
            logger.info("the next job of the chain goes on")
            return ExitCode.RESUMABLE
        return self._requeued()

    def _requeued(self) -> int:
        if self.max_requeues == 0:
            logger.info("not requeued, as asked; submitted again, the same job goes on")
            return ExitCode.RESUMABLE
        if self._restarts >= self.max_requeues:
            return self._give_up(f"job {self._task} has been requeued {self._restarts} times, and may not be again")
        try:
            requeue(self._task)
        except SlurmError as error:
            logger.error(
                "%s. Submitted again, the same job goes on; `batchgen submit --chain N` needs no requeue", error
            )
            return ExitCode.RESUMABLE
        logger.info("requeued, to go on")
        deadline = time.monotonic() + 120.0
        while not self._ended and time.monotonic() < deadline:  # Slurm ends us
            time.sleep(0.2)
        return ExitCode.RESUMABLE

    def _code_of(self, finished: Status) -> int:
        # The next job of a chain waits for a failure of this one.
        return 0 if self.chained else finished.exit_code

    def _give_up(self, why: str) -> int:
        logger.error("not starting again: %s", why)
        note_end(self.run, self._task or str(os.getpid()), GAVE_UP, why)
        return ExitCode.CANNOT_RUN


def _log_progress(status: Status) -> None:
    which = "" if status.shard == WHOLE else f"shard {status.shard}: "
    logger.info("%s%d of %d rows good, %d failed, %d open", which, status.good, status.rows, status.failed, status.open)
