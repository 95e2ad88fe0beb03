"""The whole flow: rows → prompts → this stream's queue → engine → committed batches → merged output.

prompts.jsonl ─formats→ rows ─requests→ Prompt ─schedule→ queue ─Engine.generate→ batches ─checkpoint→ run folder
                                                   ▲ minus done                                           │
                                                   └──────────────────── RunFolder.done ◄─────────────────┘
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from batchgen import checkpoint
from batchgen.checkpoint import Attempt, CheckpointError, Done, RunFolder, Status, merge_with, write_lines
from batchgen.engine import Died
from batchgen.formats.input import Input
from batchgen.redaction import redact
from batchgen.runs import launcher
from batchgen.runs.begin import begin, join
from batchgen.runs.manifest import provenance
from batchgen.runs.prepare import Ready
from batchgen.runs.role import Role
from batchgen.runs.settings import Host, OutputFormat, RunError, RunSettings
from batchgen.runs.stop import Stop
from batchgen.runs.watchdog import await_ranks
from batchgen.runs.worker import StreamWorker
from batchgen.types import ExitCode, UserError

logger = logging.getLogger(__name__)


class MergeError(UserError):
    """The generations are recorded, but the output files could not be written: a sentence for the person at the
    terminal. The next start writes them."""


def run(
    inputs: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    settings: RunSettings | None = None,
    *,
    host: Host | None = None,
) -> Status:
    """Generates for every prompt of `inputs`, exactly once, and writes the run folder `out`.

    Called again it goes on where it stopped, whatever stopped it; engine, batch size and ranks may differ then, all
    else must be as it was. Under torchrun or srun every rank calls it. SIGINT, SIGTERM and SIGUSR2 stop it cleanly.

    Args:
        inputs: files, folders saved by `datasets`, or patterns.
        out: the run folder; None: in the working folder, named after the first input.
        settings: what the run does with its input; None: every setting's default.
        host: where and how it is carried out; None: in this process, or as the launcher's variables say.

    Returns:
        The state of the run over all attempts: `open` rows are left for the next start, `failed` ones have an error.

    Raises:
        UserError: it could not start; its subclasses are RunError, InputError, ModelError, EngineError, CheckpointError
            and WorldError. MergeError: all is generated and recorded, but the output files could not be written.
    """
    settings, host = settings or RunSettings(), host or Host()
    files = [os.fspath(path) for path in ([inputs] if isinstance(inputs, (str, os.PathLike)) else inputs)]
    folder = RunFolder(Path(out) if out is not None else default_folder(files))
    role = Role.of(host)
    stop = Stop()
    with stop.on_signals():
        if role.speaks_for_the_run:
            ready, attempt = begin(files, folder, settings, role, host)
        else:
            ready, attempt = join(files, folder, settings, role)
        start = _Start(ready, attempt, role, host, stop)
        with start.recording_why_it_fails():
            start.generate()
            return start.finish()


def default_folder(inputs: Sequence[str]) -> Path:
    """The run folder where none is named: in the working folder, the first file's name up to its first dot."""
    name = Path(inputs[0]).name if inputs else ""
    stem = re.sub(r"[*?\[\]]+", "-", name.lstrip(".").partition(".")[0]).strip("-")
    if stem and os.path.realpath(stem) == os.path.realpath(inputs[0]):
        stem += "-out"  # the input is a folder: never write into it
    return Path(stem or "out")


class _Start:
    """This process's part in one start of a run, from the attempt it has claimed or joined to the end of it."""

    def __init__(self, ready: Ready, attempt: Attempt, role: Role, host: Host, stop: Stop) -> None:
        self._ready, self._role, self._host, self._stop = ready, role, host, stop
        self._attempt = attempt  # the last one: a launcher begins another after running out of memory

    def generate(self) -> None:
        """Does the work of this process, or lets its ranks do it."""
        # Read before the engine exists: in a tensor-parallel group, a rank that read it later could see a batch that
        # the first rank has just recorded, and the two would generate different batches.
        done = self._attempt.folder.done(len(self._ready.source))
        if self._role.launches_ranks:
            self._launch_ranks(done)
            return
        with self._showing_progress(done.part(self._host.shard)):
            stall_seconds = self._host.stall_seconds
            StreamWorker(self._ready, self._role.world, self._attempt, done, self._stop, stall_seconds).work()

    def _launch_ranks(self, done: Done) -> None:
        """Starts the ranks and waits for them; starts them again where they ran out of memory in a common step."""
        host, part = self._host, done.part(self._host.shard)
        while part.has_rows_to_do:
            with self._showing_progress(part):
                codes = launcher.start_ranks(
                    self._attempt, host.rank_command, host.ranks, self._stop, host.environment, host.stall_seconds
                )
            refused = [rank for rank, code in enumerate(codes) if code == ExitCode.CANNOT_RUN]
            if refused:
                raise RunError(f"{launcher.in_words(refused)} could not run; it says above why")
            if self._stop.signal is not None or not self._attempt.folder.has_limits_of(self._attempt.number):
                return
            self._stop.reason = None  # that a rank died is why the ranks are started again
            logger.warning("out of memory; starting the ranks again, with smaller batches")
            self._end_attempt("out of memory in a step that all ranks take together")
            self._attempt = self._claim_again()
            part = self._attempt.folder.done(len(self._ready.source)).part(self._host.shard)

    def _claim_again(self) -> Attempt:
        folder, recorded = self._attempt.folder, provenance(self._ready, self._role)
        return checkpoint.claim(
            folder, self._role.world, recorded, self._host.heartbeat_seconds, shard=self._host.shard
        )

    def _showing_progress(self, part: Done) -> AbstractContextManager[object]:
        if self._host.watch is None or not self._role.speaks_for_the_run:
            return nullcontext()
        return self._host.watch(self._attempt, part)

    def finish(self) -> Status:
        """Ends the attempt, and merges if no row is open, in the process that speaks for the run."""
        folder, shard = self._attempt.folder, self._attempt.shard
        if not self._role.speaks_for_the_run:
            return checkpoint.status(folder, shard)
        has_lost_ranks = not self._role.is_single_process and not await_ranks(self._attempt, self._role.world.size)
        is_damaged = self._merge_if_complete()
        why = self._why_rows_are_open(is_damaged)
        has_open_rows = checkpoint.status(folder, shard, verify=is_damaged).open > 0
        self._end_attempt(why if has_open_rows else "finished")
        if has_lost_ranks and has_open_rows:  # the launcher ends the ranks that are left
            raise Died(f"{why}; some of the {self._role.world.size} ranks have not ended cleanly")
        return checkpoint.status(folder, shard, verify=is_damaged)

    def _merge_if_complete(self) -> bool:
        """Writes the output once no row of the whole run is open: whoever finishes the last shard does so. Two that
        end at once write the same bytes.

        Returns:
            All seemed done, but what was recorded of some rows is damaged, so that they are open again.
        """
        folder = self._attempt.folder
        if checkpoint.status(folder).open:
            return False
        # Only now, since that reads all text.
        if checkpoint.status(folder, verify=True).open:
            return True
        self._merge()
        return False

    def _merge(self) -> None:
        typed = not self._ready.answers_requests
        try:
            merge(self._attempt.folder, self._ready.source, self._ready.settings.output_format, typed=typed)
        except CheckpointError as error:
            raise MergeError(str(error)) from error

    def _why_rows_are_open(self, damaged: bool) -> str:
        reasons = [self._stop.reason, *(heartbeat.get("reason") for heartbeat in self._attempt.heartbeats().values())]
        otherwise = "what was recorded of some rows is damaged" if damaged else "ended with open rows: a rank died"
        return next(filter(None, reasons), otherwise)

    @contextmanager
    def recording_why_it_fails(self) -> Iterator[None]:
        """Meanwhile, records why the attempt ended by an exception, if this process alone speaks for it."""
        try:
            yield
        except BaseException as error:
            if self._role.is_single_process:
                reason = f"failed: {type(error).__name__}: {error}"
                self._end_attempt(redact(reason, self._host.environment))
            raise

    def _end_attempt(self, how: str) -> None:
        try:
            self._attempt.end(how)
        except OSError as error:
            # Everybody sees from the process that it is gone; only the reason is lost.
            logger.warning("%s. Make room: not even that the attempt has ended can be recorded (%s)", how, error)


def merge(folder: RunFolder, source: Input | None, output_format: OutputFormat, *, typed: bool = True) -> Path:
    """Writes the output files of `folder` from what is recorded; gives the path of the generations.

    Args:
        source: the input, whose columns keep their types in Parquet and Arrow; None: infer them from the rows.
    """
    rows = int(folder.read_identity()["rows"])
    if output_format == "jsonl":
        return merge_with(write_lines, folder, rows, "generations.jsonl")
    from batchgen.runs.tables import write_table  # pyarrow takes a quarter of a second

    write = partial(write_table, format=output_format, source=source if typed else None)
    return merge_with(write, folder, rows, f"generations.{output_format}")
