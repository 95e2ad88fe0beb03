"""The thread that keeps the device busy: while one step runs, the step before it is read and the next one planned."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

import torch

from batchgen.device import is_out_of_memory
from batchgen.engines.paged import sizing
from batchgen.engines.paged.finished import Finished
from batchgen.engines.paged.flight import Flight
from batchgen.engines.paged.lockstep import Leader, no_memory
from batchgen.engines.paged.pages import SIZE
from batchgen.engines.paged.runner import NOT_FINITE, Runner
from batchgen.engines.paged.scheduler import Scheduler
from batchgen.engines.paged.step import Sequence
from batchgen.generation.stopping import StopTexts
from batchgen.types import Prompt

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 0.05
_HELD_ROWS, _HELD_SECONDS = 64, 10.0  # that have ended and wait for the check of the first ones, at most


class Loop:
    """Prompts in, finished rows out, in a thread of its own.

    Args:
        end_tokens: that end a row.
        watch: makes what finds the stop texts of a prompt.
        check: is shown the first rows that finish, in the thread that runs the model, before anybody else is.
        enough: whether these rows are what the check wants; else more are waited for, a little.
        count: is told how many tokens each step has generated.
        leader: of the ranks that make each step together with this one, if it is not alone.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        device: torch.device,
        end_tokens: frozenset[int],
        watch: Callable[[Prompt], StopTexts],
        check: Callable[[list[Finished]], None] | None,
        enough: Callable[[list[Finished]], bool] = bool,
        count: Callable[[int], None],
        leader: Leader | None = None,
    ) -> None:
        self._scheduler, self._runner, self._device = scheduler, runner, device
        self._leader = leader
        self._end, self._watch, self._count = end_tokens, watch, count
        self._check, self._enough = check, enough
        self._held: list[Finished] = []
        self._held_since = 0.0
        self._inbox: queue.SimpleQueue[list[Prompt] | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[list[Finished] | BaseException | None] = queue.SimpleQueue()
        self._watched: dict[Sequence, StopTexts] = {}
        self._all_in = False
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, name="paged", daemon=True)
        self._pages = scheduler.pages  # at first
        self.most_running = 0  # sequences at once
        self.has_generated = False  # a step has been read
        self.error: BaseException | None = None  # of which the thread has died
        self._pending = 0  # prompts given and not finished

    @property
    def waiting(self) -> int:
        """Prompts that have been given and do not run yet; an estimate, from another thread."""
        return self._pending - self._scheduler.running

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def give(self, prompts: list[Prompt]) -> None:
        """More prompts; none: there are no more."""
        self._pending += len(prompts)
        self._inbox.put(prompts or None)

    def finished(self, timeout: float) -> list[Finished] | None:
        """Rows that have finished since the last call, after at most `timeout` seconds; None: all have.

        Raises:
            BaseException: what the thread has died of.
        """
        rows: list[Finished] = []
        until = time.monotonic() + timeout
        while True:
            try:
                found = self._outbox.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return rows
            if found is None:
                if not rows:
                    return None
                self._outbox.put(None)
                return rows
            if isinstance(found, BaseException):
                raise found
            self._pending -= len(found)
            rows += found

    def stop(self) -> None:
        """Ends the thread after the current step; what runs is dropped."""
        self._leave.set()
        self._inbox.put([])
        self._thread.join()

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            self._work()
            self._outbox.put(None)
            # The rows may take long to be recorded, and the other ranks wait for as long.
            while self._leader is not None and not self._leave.wait(_IDLE_SECONDS):
                self._leader.breathe()
        except BaseException as error:  # it belongs to whoever waits for the rows
            self.error = error
            self._outbox.put(error)

    def _work(self) -> None:
        flight: Flight | None = None
        while not self._leave.is_set():
            if self._leader is not None:
                self._leader.breathe()
            self._take(wait=flight is None and not self._scheduler.running)
            try:
                flight = self._advance(flight)
                continue_smaller = False
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self._leader is not None:
                    raise no_memory(self._scheduler.pages) from error
                continue_smaller = True
            if continue_smaller:  # only here: while the exception is handled, it holds the tensors of the failed call
                flight = None
                self._shrink()
            if flight is None and self._all_in and not self._scheduler.running and not self._scheduler.waiting:
                self._hand_over([], last=True)
                return

    def _advance(self, flight: Flight | None) -> Flight | None:
        """The next step is on its way when the one before it is read."""
        if flight is not None and self._scheduler.short_of_pages():
            self._read(flight)
            flight = None
        step = self._scheduler.plan()
        self.most_running = max(self.most_running, self._scheduler.running)
        following = (self._leader or self._runner).launch(step) if step is not None else None
        if flight is not None:
            self._read(flight)
        return following

    def _shrink(self) -> None:
        """Goes on with a smaller cache, and whatever ran begins again: a forward has found no memory beside it."""
        pages = sizing.shrunk(self._scheduler.pages, self._pages)
        logger.warning("out of memory in a forward; going on with a cache of %d tokens", pages * SIZE)
        refused = self._scheduler.restart(pages)
        self._runner.allocate(pages)
        self._refuse(refused)

    def _refuse(self, prompts: list[Prompt]) -> None:
        if prompts:
            self._outbox.put([Finished(prompt, None) for prompt in prompts])

    def _take(self, wait: bool) -> None:
        """What has come in; if there is nothing else to do, waits for it."""
        while not self._all_in:
            try:
                wait = wait and not self._scheduler.waiting
                prompts = self._inbox.get(block=wait, timeout=_IDLE_SECONDS if wait else None)
            except queue.Empty:
                return
            if prompts is None:
                self._all_in = True
                self._scheduler.complete()
            else:
                self._scheduler.add([prompt for prompt in prompts if self._scheduler.holds(prompt)])
                self._refuse([prompt for prompt in prompts if not self._scheduler.holds(prompt)])
                wait = False

    def _read(self, flight: Flight) -> None:
        """The tokens of a step, and what they end."""
        tokens = flight.read()
        self.has_generated = True
        for sequence, logprob in flight.logprobs():
            if sequence.slot >= 0 and sequence.logprobs is not None:
                sequence.logprobs.append(logprob)
        ended: list[Finished] = []
        ends, kept = self._end, 0
        for sequence, token in zip(flight.step.sequences, tokens, strict=True):
            if sequence.slot < 0:
                continue  # it ended in the step before, when this one had begun
            if token == NOT_FINITE:
                self._scheduler.ended(sequence)
                self._watched.pop(sequence, None)
                self._outbox.put([Finished(sequence.prompt, None, not_finite=True)])
                continue
            sequence.tokens.append(token)
            kept += 1
            stopped = token in ends or (bool(sequence.prompt.params.stop) and self._stops(sequence, token))
            if stopped or len(sequence.tokens) == sequence.begin + sequence.most:
                self._scheduler.ended(sequence)
                self._watched.pop(sequence, None)
                ended.append(Finished(sequence.prompt, sequence.tokens[sequence.begin :], stopped, sequence.logprobs))
        self._count(kept)
        self._hand_over(ended)

    def _hand_over(self, ended: list[Finished], *, last: bool = False) -> None:
        """Rows that have ended, once the check has seen the first of them."""
        if self._check is not None:
            if ended and not self._held:
                self._held_since = time.monotonic()
            self._held += ended
            if not self._held:
                return
            long = len(self._held) >= _HELD_ROWS or time.monotonic() - self._held_since > _HELD_SECONDS
            if not (last or long or (ended and self._enough(self._held))):
                return
            ended, self._held = self._held, []
            try:
                self._check(ended)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self._leader is not None:
                    raise
                logger.warning("there is no memory for the self-test: the text of the first rows was not looked at")
            self._check = None
        if ended:
            self._outbox.put(ended)

    def _stops(self, sequence: Sequence, token: int) -> bool:
        texts = self._watched.get(sequence)
        if texts is None:
            texts = self._watched[sequence] = self._watch(sequence.prompt)
        return bool(texts.append([token]))
