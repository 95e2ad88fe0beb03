"""What one rank does: its stream's queue through the engine, each finished batch into the run folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import chain

from batchgen import packages
from batchgen.checkpoint import Attempt, Done, Heartbeat, Writer
from batchgen.engine import Engine, OutOfStep, Stream
from batchgen.engines import settings_of
from batchgen.requests.output import renderer
from batchgen.runs.engine_setup import make_setup
from batchgen.runs.prepare import Ready
from batchgen.runs.samples import Samples
from batchgen.runs.schedule import open_rows, order, shard, windows
from batchgen.runs.stacks import answering
from batchgen.runs.stop import Stop
from batchgen.runs.watchdog import Watchdog
from batchgen.types import CANNOT_WRITE, TOO_MANY_FAILED, WHOLE, Batch, Generation, Prompt, UserError
from batchgen.world import World

logger = logging.getLogger(__name__)

_NAMED = 5  # rows in work that are named where a rank dies


class StreamWorker:
    """One rank's work in one attempt, and the count of it that the heartbeat writes down."""

    def __init__(
        self, ready: Ready, world: World, attempt: Attempt, done: Done, stop: Stop, stall_seconds: float
    ) -> None:
        self._ready, self._attempt, self._done, self._stop = ready, attempt, done, stop
        self._conditions = {
            "engine": ready.engine,
            "settings": settings_of(ready.options),
            "dtype": ready.dtype,
            "ranks": world.size,
        }
        limits = attempt.folder.limits(self._conditions)
        self._setup = replace(make_setup(ready, world), run=_name_of(attempt), limits=limits)
        self.stream: Stream = ready.kind.stream(world, ready.options)
        self._rows = shard(len(ready.source), self.stream, attempt.shard)
        self._most_failures = ready.settings.max_error_rate * len(self._rows)
        self._stall_seconds = stall_seconds
        self._writer = Writer(
            attempt.folder.path, attempt.number, self.stream.index, world.rank, _renderer(ready, attempt)
        )
        self._engine: Engine | None = None
        self._samples = Samples()
        self._in_work: dict[int, Prompt] = {}  # that the engine has not finished, by their row
        self._refused: list[Generation] = []  # rows that became no prompt, waiting for the next commit
        self._refused_before = 0  # rows refused again, which an earlier attempt has recorded
        self._mark = time.perf_counter()
        self._state = "loading"
        self._ready_at: float | None = None
        self._devices: list[str] = []
        self._rows_done = self._failed = self._prompt_tokens = self._committed_tokens = 0

    def work(self) -> None:
        """Everything from the first row to the last commit. Returns early if the stop request is set."""
        rank = self._setup.world.rank
        with answering(), Heartbeat(self._attempt, rank, self._count) as heartbeat, closing(self._writer):
            try:
                self._generate(heartbeat)
                self._state = "stopped" if self._stop() else "finished"
            except OutOfStep as error:
                self._state = "failed"
                if error.rows:
                    length, rows = error.length, error.rows // 2
                    self._attempt.folder.add_limit(self._attempt.number, rank, self._conditions, length, rows)
                raise
            except BaseException as error:
                self._state = "failed"
                if self._in_work and not isinstance(error, UserError):
                    error.add_note(f"{self._named()} in work")
                raise

    def _generate(self, heartbeat: Heartbeat) -> None:
        prompts = self._queue(heartbeat)
        # Before the engine, so that a start with nothing left to generate loads no model. If the ranks make collective
        # calls, every rank must make the engine, because the others wait for it.
        first = next(prompts, None)
        together = self._ready.kind.will_call_together(self._ready.options) and self._anything_open()
        if self._stop() and not together:
            return
        if first is None and not together:
            self._begin(heartbeat)
            self._commit(Batch([]), heartbeat)
            return
        rank, limit = self._setup.world.rank, self._stall_seconds
        needed = self._ready.kind.packages(self._ready.options, self._ready.dtype)
        packages.check_imports(needed, f"engine {self._ready.engine}")
        with packages.without_old_garbage(), self._ready.kind(self._setup, self._ready.options) as engine:
            self._engine = engine
            self._look_at_devices()
            self._begin(heartbeat)
            queue = self._noted(prompts if first is None else chain([first], prompts))
            with Watchdog(engine, self._attempt, rank, self._count, self._stop.request, limit):
                for batch in engine.generate(queue, self._stop):
                    self._commit(batch, heartbeat)
                self._commit(Batch([]), heartbeat)

    def _anything_open(self) -> bool:
        return self._done.part(self._attempt.shard).has_rows_to_do

    def _begin(self, heartbeat: Heartbeat) -> None:
        self._mark = time.perf_counter()
        self._state, self._ready_at = "running", time.time()
        heartbeat.write()

    def _queue(self, heartbeat: Heartbeat) -> Iterator[Prompt]:
        """This stream's prompts, put in order window by window; rows that become none wait for the next commit."""
        source, reader = self._ready.source, self._ready.reader
        for number, window in enumerate(windows(open_rows(self._rows, self._done.is_good), source.bytes_of)):
            prompts: list[Prompt] = []
            for outcome in reader.read(list(source.rows(window))):
                if isinstance(outcome, Prompt):
                    prompts.append(outcome)
                elif not self._done.is_failed(outcome.index):
                    # The input is the same and so is the verdict: it need not be written down again at every start.
                    self._refused.append(outcome)
                else:
                    self._refused_before += 1
            if not prompts:
                # No batch may come for a long time, and all rows of a wrong file would pile up.
                self._commit(Batch([]), heartbeat)
                if self._engine is None and self._stop():
                    return  # an engine that exists agrees with its ranks first, and leaves by itself
            yield from self._samples.spread(order(prompts, number))

    def _noted(self, prompts: Iterator[Prompt]) -> Iterator[Prompt]:
        for prompt in prompts:
            self._in_work[prompt.index] = prompt
            yield prompt

    def _named(self) -> str:
        """What is in work, in words; asked by the heartbeat's thread, too."""
        ids = [prompt.id for prompt in list(self._in_work.values())]
        if not ids:
            return ""
        more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
        return f"row{'s' if len(ids) > 1 else ''} {', '.join(ids[:_NAMED])}{more}"

    def _commit(self, batch: Batch, heartbeat: Heartbeat) -> None:
        batch = self._samples.join(batch)
        incomplete = []
        for generation in batch.generations:
            prompt = self._in_work.pop(generation.index, None)
            if prompt is not None and prompt.params.constraint is not None and _is_cut(generation):
                incomplete.append(generation.index)
        refused, self._refused = self._refused, []
        generations = [*batch.generations, *refused]
        if not generations or not self.stream.writes or self._writer.broken:
            return
        now = time.perf_counter()
        try:
            whole = replace(batch, generations=generations, incomplete=incomplete)
            record = self._writer.commit(whole, now - self._mark)
        except OSError as error:
            # What is recorded is safe; the engine is asked to end, and the rest is done again by the next start.
            reason = f"{CANNOT_WRITE} {self._attempt.folder.path}: {error.strerror or error}"
            if self._setup.world.size > 1 and self._setup.world.attempt is None:
                logger.error("%s", reason)  # else it is said at the end, once for all ranks
            self._stop.request(reason)
            return
        self._mark = now
        if record.first:
            self._look_at_devices()  # weights that wait in host memory come to a GPU with the first step
        self._rows_done += record.prompts
        self._failed += len(record.failed)
        self._prompt_tokens += record.prompt_tokens
        self._committed_tokens += record.generated_tokens
        heartbeat.write()
        failed = self._failed + self._refused_before
        if failed > self._most_failures:
            reason = f"{failed} of this stream's {len(self._rows)} rows have failed, {TOO_MANY_FAILED}"
            logger.error("%s; the last one: %s", reason, _last_error(generations) or "in an earlier start")
            self._stop.request(reason)

    def _look_at_devices(self) -> None:
        if self._ready.kind.needs_model:
            from batchgen import device  # with torch, which an engine without a model does without

            self._devices = device.devices()

    def _count(self) -> Mapping[str, object]:
        generated = self._engine.signs.generated_tokens if self._engine is not None else 0
        return {
            "state": self._state,
            "reason": self._stop.reason,
            "stream": self.stream.index,
            "ready": self._ready_at,
            "devices": self._devices,
            "in_work": self._named(),
            "rows": self._rows_done if self.stream.writes else 0,
            "failed": self._failed if self.stream.writes else 0,
            "prompt_tokens": self._prompt_tokens,
            "committed_tokens": self._committed_tokens,
            "generated_tokens": generated if self.stream.writes else 0,
            "steps": self._engine.signs.steps if self._engine is not None else 0,
            "refused_again": self._refused_before,
            "at_ease": self._engine is not None and self._engine.signs.is_waiting,
        }


def _name_of(attempt: Attempt) -> str:
    """What tells this run, or its shard, from others that work on this host at the same time."""
    path, shard = str(attempt.folder.path.absolute()), attempt.shard
    return path if shard == WHOLE else f"{path} {shard}"


def _renderer(ready: Ready, attempt: Attempt) -> Callable[[Generation], bytes]:
    """What turns a generation into its line of the output."""
    recipe, error_format = ready.settings.recipe, ready.settings.error_format
    return renderer(recipe.model or ready.model.name, attempt.folder.created, error_format, ready.answers_requests)


def _is_cut(generation: Generation) -> bool:
    """Whether one of its samples has ended by its length."""
    return any(sample.finish_reason == "length" for sample in (generation, *generation.others))


def _last_error(generations: list[Generation]) -> str:
    return next((g.error.message for g in reversed(generations) if g.error is not None), "")
