"""The whole flow: rows → prompts → this stream's queue → engine → committed batches → merged output.

prompts.jsonl ─formats→ rows ─prompts→ Prompt ─schedule→ queue ─Engine.generate→ batches ─checkpoint→ run folder
                                                  ▲ minus done                                          │
                                                  └──────────────────── RunFolder.done ◄────────────────┘
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from batchgen import checkpoint
from batchgen.checkpoint import (
    HEARTBEAT_SECONDS,
    Attempt,
    CheckpointError,
    Done,
    RunFolder,
    Status,
    merge_with,
    write_lines,
)
from batchgen.engine import Died
from batchgen.formats.input import Input, files_of
from batchgen.planning.auto import AUTO
from batchgen.redaction import redacted
from batchgen.requests.output import ErrorFormat, renderer
from batchgen.requests.recipe import Recipe
from batchgen.runs import launcher
from batchgen.runs.manifest import asked, facts
from batchgen.runs.prepare import Ready, RunError, check_all, check_engine, prepare
from batchgen.runs.stop import Stop
from batchgen.runs.watchdog import STALL_SECONDS, await_ranks
from batchgen.runs.worker import Share
from batchgen.types import WHOLE, Shard, UserError
from batchgen.world import World, check_start, from_environment

logger = logging.getLogger(__name__)

OutputFormat = Literal["jsonl", "parquet", "arrow"]


class MergeError(UserError):
    """The generations are recorded, but the output files could not be written: a sentence for the person at the
    terminal. The next start writes them."""


@dataclass(frozen=True)
class Host:
    """Where and how a run is carried out: what the command line knows and an ordinary caller need not say."""

    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)  # the launcher's variables
    ranks: int = 1  # processes to start on this host with `rank_command`; 1: the calling process does the work
    rank_command: Sequence[str] = ()  # arguments of `python -m batchgen` that start one rank
    shard: Shard = WHOLE  # the part of the input that this start does: other starts do the rest, at the same time
    heartbeat_seconds: float = HEARTBEAT_SECONDS  # after 18 missed ones, another host may take the run over
    stall_seconds: float = STALL_SECONDS  # without a step, the process ends with code 75, whoever called; 0: never
    watch: Callable[[Attempt, Done], AbstractContextManager[object]] | None = None  # shows progress meanwhile

    def __post_init__(self) -> None:
        if self.ranks < 1 or (self.ranks > 1 and not self.rank_command):
            raise ValueError("ranks must be 1, or more with the rank_command that starts one of them")


def run(
    inputs: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    model: str | None = None,
    engine: str = AUTO,
    settings: Sequence[str] = (),
    dtype: str = "auto",
    batch_size: int | None = None,
    selftest: bool = True,
    strict: bool = False,
    max_error_rate: float = 1.0,
    output_format: OutputFormat = "jsonl",
    error_format: ErrorFormat = "openai",
    host: Host | None = None,
) -> Status:
    """Generates for every prompt of `inputs`, exactly once, and writes the run folder `out`.

    Called again it goes on where it stopped, whatever stopped it; engine, batch size and ranks may differ then, all
    else must be as it was. Under torchrun or srun every rank calls it. SIGINT, SIGTERM and SIGUSR2 stop it in order.

    Args:
        inputs: files, folders saved by `datasets`, or patterns.
        out: the run folder; None: in the working folder, named after the first input.
        recipe: how rows become prompts, and the sampling for what they do not set themselves.
        model: a folder, `ORG/NAME[@REVISION]` of the hub on this machine, or None for the default model.
        engine, settings: a name of `batchgen.engines.names()`, and `name=value` for its `Options`; auto: of those that
            know these settings and fit, the one that a forecast says is the fastest (`batchgen.planning.auto`).
        dtype: auto, float32, bfloat16, float16, int8 or nf4.
        batch_size: most prompts in a batch; None: as many as fit.
        selftest: compare rows of the first batch with themselves alone, and stop if the batch has changed them.
        strict: look at every row before the model loads, and raise if one is bad.
        max_error_rate: the run stops once more than this share (0 to 1) of a stream's rows have failed.
        output_format, error_format: of the merged generations; of the answers to OpenAI lines that fail.

    Returns:
        The state of the run over all attempts: `open` rows are left for the next start, `failed` ones have an error.

    Raises:
        UserError: it could not start; its kinds are RunError, InputError, ModelError, EngineError, CheckpointError and
            WorldError. MergeError: all is generated and recorded, but the output files could not be written.
    """
    host = host or Host()
    files = [os.fspath(one) for one in ([inputs] if isinstance(inputs, (str, os.PathLike)) else inputs)]
    folder = RunFolder(Path(out) if out is not None else default_folder(files))
    world = from_environment(host.environment)
    check_start(host.environment, host.ranks)
    chosen = (recipe or Recipe(), host.environment, model, engine, settings, dtype, batch_size)
    stop = Stop()
    with stop.on_signals():
        opened = partial(prepare, files, folder, *chosen, selftest=selftest, ranks=host.ranks)
        ready, first = _begun(folder, files, opened, world, host, strict, error_format)
        attempts = [first]
        with _end_if_it_fails(attempts, world, host):
            _carry_out(ready, attempts, world, host, stop, max_error_rate, error_format)
            return _finish(ready, attempts[-1], world, stop, output_format)


def default_folder(inputs: Sequence[str]) -> Path:
    """The run folder where none is named: in the working folder, the first file's name up to its first dot."""
    name = Path(inputs[0]).name if inputs else ""
    stem = re.sub(r"[*?\[\]]+", "-", name.lstrip(".").partition(".")[0]).strip("-")
    if stem and os.path.realpath(stem) == os.path.realpath(inputs[0]):
        stem += "-out"  # the input is a folder: never write into it
    return Path(stem or "out")


def _begun(
    folder: RunFolder,
    inputs: Sequence[str],
    opened: Callable[..., Ready],
    world: World,
    host: Host,
    strict: bool,
    error_format: ErrorFormat,
) -> tuple[Ready, Attempt]:
    """The opened input, and the attempt: one process claims it on behalf of all ranks, the others find it."""
    if world.rank > 0 or world.attempt is not None:
        attempt = checkpoint.join(folder, world)
        return opened(begun=attempt.claim), attempt
    folder.check_apart(files_of(inputs))
    new = folder.make()
    try:
        before = checkpoint.check_free(folder, world, host.shard)
        with folder.scanning() as scratch:
            ready = opened(into=scratch)
            if strict:
                check_all(ready)
            known = facts(ready, max(world.size, host.ranks), host.environment)
            _enter(folder, ready, world, host, asked(ready, error_format), known)
            ready.source.keep()
    except BaseException:
        for made in new:  # a refused start leaves nothing
            with suppress(OSError):  # it is in use
                made.rmdir()
        raise
    attempt = checkpoint.claim(folder, world, known, host.heartbeat_seconds, before, host.shard)
    if host.shard == WHOLE:
        folder.sweep()  # nobody else works here
    return ready, attempt


def _enter(
    folder: RunFolder,
    ready: Ready,
    world: World,
    host: Host,
    wanted: Mapping[str, object],
    known: Mapping[str, object],
) -> None:
    """Begins the run, or checks that it is the one that has begun; writes nothing before all is well.

    Raises:
        UserError: it is another one, or the engine has something to do and cannot run here.
    """
    begun = folder.begun()
    if begun:
        folder.ask(wanted, known)
        mine = folder.done(len(ready.source), verify=False).part(host.shard)
    if not begun or mine.good < len(mine.states):
        check_engine(ready, world, host.ranks)
    if not begun:
        folder.ask(wanted, known, ready.source.originals)


@contextmanager
def _end_if_it_fails(attempts: Sequence[Attempt], world: World, host: Host) -> Iterator[None]:
    """Records why the last attempt ended, if this process alone speaks for it."""
    try:
        yield
    except BaseException as error:
        if world.size == 1:
            _end(attempts[-1], redacted(f"failed: {type(error).__name__}: {error}", host.environment))
        raise


def _carry_out(
    ready: Ready,
    attempts: list[Attempt],
    world: World,
    host: Host,
    stop: Stop,
    max_error_rate: float,
    error_format: ErrorFormat,
) -> None:
    """This process's share, or its ranks' shares, over as many attempts as memory asks for, which `attempts` gets."""
    attempt = attempts[-1]
    # Before the engine exists: in a tensor-parallel group, a rank that read it later could see a batch that the first
    # one has just recorded, and the two would generate different batches.
    done = attempt.folder.done(len(ready.source))
    mine = done.part(host.shard)
    shown = host.watch if world.rank == 0 and world.attempt is None else None
    if host.ranks == 1 or world.size > 1:
        model_name = ready.recipe.model or ready.model.name
        render = renderer(model_name, attempt.folder.created, error_format, ready.answers_requests)
        with shown(attempt, mine) if shown else nullcontext():
            Share(ready, world, attempt, done, stop, max_error_rate, host.stall_seconds, render).work()
        return
    if mine.good == len(mine.states):
        return  # no rank has anything to do
    while True:
        with shown(attempt, mine) if shown else nullcontext():
            codes = launcher.start_ranks(
                attempt, host.rank_command, host.ranks, stop, host.environment, host.stall_seconds
            )
        refused = [rank for rank, code in enumerate(codes) if code == 4]
        if refused:
            raise RunError(f"{launcher.in_words(refused)} could not run; it says above why")
        if stop.signal is not None or not attempt.folder.has_limits_of(attempt.number):
            return
        stop.reason = None  # that a rank died is why we start again
        logger.warning("out of memory; starting the ranks again, with smaller batches")
        _end(attempt, "out of memory in a step that all ranks take together")
        known = facts(ready, host.ranks, host.environment)
        attempt = checkpoint.claim(attempt.folder, world, known, host.heartbeat_seconds, shard=host.shard)
        attempts.append(attempt)
        mine = attempt.folder.done(len(ready.source)).part(host.shard)


def _finish(ready: Ready, attempt: Attempt, world: World, stop: Stop, output_format: OutputFormat) -> Status:
    """Ends the attempt, and merges if nothing is open: the starter for its ranks, or rank 0 of an outside launcher."""
    shard = attempt.shard
    if world.attempt is not None or world.rank > 0:
        return checkpoint.status(attempt.folder, shard)  # the starter, or rank 0, does it
    missing = world.size > 1 and not await_ranks(attempt, world.size)
    # Of the whole run: whoever finishes the last shard merges. Two that end at once write the same bytes.
    # Verified only when all seems done, since that reads all text.
    complete = not checkpoint.status(attempt.folder).open
    damaged = complete and checkpoint.status(attempt.folder, verify=True).open > 0
    if complete and not damaged:
        try:
            merge(attempt.folder, ready.source, output_format, typed=not ready.answers_requests)
        except CheckpointError as error:
            raise MergeError(str(error)) from error
    reasons = [stop.reason, *(beat.get("reason") for beat in attempt.heartbeats().values())]
    otherwise = "what was recorded of some rows is damaged" if damaged else "ended with open rows: a rank died"
    why = next(filter(None, reasons), otherwise)
    status = checkpoint.status(attempt.folder, shard, verify=damaged)
    _end(attempt, why if status.open else "finished")
    if missing and status.open:
        raise Died(f"{why}; some of the {world.size} ranks have not ended in order")  # the launcher ends them
    return checkpoint.status(attempt.folder, shard, verify=damaged)


def _end(attempt: Attempt, how: str) -> None:
    try:
        attempt.end(how)
    except OSError as error:
        # Everybody sees from the process that it is gone; only the reason is lost.
        logger.warning("%s. Make room: not even that the attempt has ended can be recorded (%s)", how, error)


def merge(folder: RunFolder, source: Input | None, output_format: OutputFormat, *, typed: bool = True) -> Path:
    """Writes the output files of `folder` from what is recorded; gives the path of the generations.

    Args:
        source: the input, whose columns keep their types in Parquet and Arrow; None: infer them from the rows.
    """
    rows = int(folder.asked()["rows"])
    if output_format == "jsonl":
        return merge_with(write_lines, folder, rows, "generations.jsonl")
    from batchgen.runs.tables import write_table  # pyarrow takes a quarter of a second

    write = partial(write_table, format=output_format, source=source if typed else None)
    return merge_with(write, folder, rows, f"generations.{output_format}")
