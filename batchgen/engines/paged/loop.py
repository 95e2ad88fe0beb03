"""The thread that keeps the device busy: it waits for prompts, plans a step, launches it, reads the one before, and
finishes the rows that have ended. So one step is always in flight while another is read and planned.

Some rows cannot have their next token chosen before the last one has been read, such as those whose text must follow a
grammar. A step with such a row is launched as far as its logits, and chooses its tokens after the one before was read.
"""

from __future__ import annotations

import logging
import queue
import threading
import time

import torch

from batchgen.device import is_out_of_memory
from batchgen.engine import SignsOfLife
from batchgen.engines.paged import sizing
from batchgen.engines.paged.finished_rows import Failure, FinishedRow, StepReader
from batchgen.engines.paged.first_rows import FirstRows
from batchgen.engines.paged.launched_step import LaunchedStep
from batchgen.engines.paged.lockstep import Leader
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.runner import Runner
from batchgen.engines.paged.scheduler import Scheduler
from batchgen.engines.paged.step import Step
from batchgen.types import Prompt

logger = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 256
"""Prompts that are tokenised and submitted at once."""

_IDLE_SECONDS = 0.05


class Loop:
    """Prompts in, finished rows out, in a thread of its own.

    Args:
        scheduler: plans the steps.
        runner: makes them.
        reader: reads their tokens.
        signs: count the steps that have been read; those of a group's leader are counted by itself.
        first_rows: hold the first rows back until they have been tested; None: there is no self-test.
        leader: of the ranks that make each step together with this one; None: it is alone.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        reader: StepReader,
        signs: SignsOfLife,
        first_rows: FirstRows | None,
        leader: Leader | None,
    ) -> None:
        self._scheduler, self._runner, self._reader = scheduler, runner, reader
        self._signs, self._first_rows, self._leader = signs, first_rows, leader
        # Prompts; None: there are no more; an empty list wakes the thread up.
        self._inbox: queue.SimpleQueue[list[Prompt] | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[list[FinishedRow] | BaseException | None] = queue.SimpleQueue()
        self._has_all_prompts = False
        self._must_stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="paged", daemon=True)
        self._first_pages = scheduler.pages  # before a forward ran out of memory
        self._unfinished = 0  # prompts that were submitted and have not been collected
        self.most_running = 0  # sequences at once, so far
        self.error: BaseException | None = None  # what the thread has died of

    @property
    def needs_prompts(self) -> bool:
        """Whether more prompts should be submitted, so that enough of them wait; an estimate, from another thread."""
        waiting = self._unfinished - self._scheduler.running
        return waiting < 2 * self._runner.limits.slots + PROMPTS_AT_ONCE

    @property
    def has_generated(self) -> bool:
        """Whether the model has made a step without an error."""
        return self._reader.has_read

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, prompts: list[Prompt]) -> None:
        """Hands in more prompts; an empty list says that there are no more."""
        self._unfinished += len(prompts)
        self._inbox.put(prompts or None)

    def collect(self, timeout: float) -> list[FinishedRow] | None:
        """Takes the rows that have finished since the last call, after at most `timeout` seconds.

        None: no row is left.

        Raises:
            BaseException: what the thread has died of.
        """
        rows: list[FinishedRow] = []
        until = time.monotonic() + timeout
        while True:
            try:
                finished = self._outbox.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return rows
            if finished is None:
                if not rows:
                    return None
                self._outbox.put(None)
                return rows
            if isinstance(finished, BaseException):
                raise finished
            self._unfinished -= len(finished)
            rows += finished

    def stop(self) -> None:
        """Ends the thread after the current step; what runs is dropped."""
        self._must_stop.set()
        self._inbox.put([])
        self._thread.join()

    def _run(self) -> None:
        try:
            if self._runner.device.type == "cuda":
                torch.cuda.set_device(self._runner.device)
            self._make_steps()
            self._outbox.put(None)
            # The rows may take long to be recorded, and the other ranks wait for as long.
            while self._leader is not None and not self._must_stop.wait(_IDLE_SECONDS):
                self._leader.ask_to_stop()
        except BaseException as error:  # it belongs to whoever waits for the rows
            self.error = error
            self._outbox.put(error)

    def _make_steps(self) -> None:
        """Makes steps until all rows have finished, or the thread must stop."""
        in_flight: LaunchedStep | None = None
        while not self._must_stop.is_set():
            if self._leader is not None:
                self._leader.ask_to_stop()
            self._wait(is_idle=in_flight is None and not self._scheduler.running)
            try:
                in_flight = self._make_step(in_flight)
                must_shrink = False
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self._leader is not None:
                    raise sizing.CacheLesson(self._scheduler.pages).to_error() from error
                must_shrink = True
            if must_shrink:  # only here: while the exception is handled, it holds the tensors of the failed call
                in_flight = None
                self._shrink_cache()
            has_work = in_flight is not None or self._scheduler.running or self._scheduler.waiting
            if self._has_all_prompts and not has_work:
                self._finish([], is_last=True)
                return

    def _make_step(self, in_flight: LaunchedStep | None) -> LaunchedStep | None:
        """Launches the next step, and then reads and finishes the one in flight; returns the launched step.

        Between reading and finishing, the tokens of the launched one are chosen, where they depend on those just read.
        """
        if in_flight is not None and self._scheduler.must_preempt():
            self._finish(self._read(in_flight))
            in_flight = None
        step = self._plan()
        launched = self._launch(step) if step is not None else None
        finished = self._read(in_flight) if in_flight is not None else None
        if launched is not None:
            self._runner.choose(launched)
        if finished is not None:
            self._finish(finished)
        return launched

    def _wait(self, *, is_idle: bool) -> None:
        """Takes the prompts that have come in; with nothing else to do, waits for some."""
        while not self._has_all_prompts:
            must_wait = is_idle and not self._scheduler.waiting
            try:
                prompts = self._inbox.get(block=must_wait, timeout=_IDLE_SECONDS if must_wait else None)
            except queue.Empty:
                return
            if prompts is None:
                self._has_all_prompts = True
                self._scheduler.spread_prefill()
            else:
                self._scheduler.add([prompt for prompt in prompts if self._scheduler.fits(prompt)])
                self._refuse([prompt for prompt in prompts if not self._scheduler.fits(prompt)])
                is_idle = False

    def _plan(self) -> Step | None:
        """Plans the next step; None: there is nothing to compute before the one in flight has been read."""
        step = self._scheduler.plan()
        self.most_running = max(self.most_running, self._scheduler.running)
        return step

    def _launch(self, step: Step) -> LaunchedStep:
        """Launches the step, on all ranks that hold the model."""
        return (self._leader or self._runner).launch(step)

    def _read(self, launched: LaunchedStep) -> list[FinishedRow]:
        """Waits for the tokens of a step in flight; the rows that they end."""
        rows = self._reader.read(launched)
        if self._leader is None:
            self._signs.steps += 1
        return rows

    def _finish(self, rows: list[FinishedRow], *, is_last: bool = False) -> None:
        """Hands over rows that have ended, once the self-test has seen the first of them."""
        failed = [row for row in rows if row.tokens is None]
        if failed:
            self._outbox.put(failed)
            rows = [row for row in rows if row.tokens is not None]
        if self._first_rows is not None:
            rows = self._first_rows.release(rows, is_last=is_last)
        if rows:
            self._outbox.put(rows)

    def _refuse(self, prompts: list[Prompt]) -> None:
        """Hands over rows that the cache has no room for."""
        if prompts:
            self._outbox.put([FinishedRow(prompt, None, Failure.NO_ROOM) for prompt in prompts])

    def _shrink_cache(self) -> None:
        """Goes on with a smaller cache, where all that ran begins again: a forward has found no memory beside it."""
        pages = sizing.shrink(self._scheduler.pages, self._first_pages)
        logger.warning("out of memory in a forward; going on with a cache of %d tokens", pages * PAGE_SIZE)
        refused = self._scheduler.restart(pages)
        self._runner.allocate(pages)
        self._refuse(refused)
