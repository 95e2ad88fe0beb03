"""Engine `paged`: continuous batching over a paged cache, on one GPU a rank or on the CPU.

Rows enter and leave the batch one by one, so that a short row never waits for a long one and nothing is padded. Every
rank holds a whole model and is a stream of its own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from batchgen import loading, memory, selftest
from batchgen.decoding import StopTexts, generation
from batchgen.encoder import HfEncoder
from batchgen.engine import Encoder, Engine, EngineError, Pace, Placement, Setup
from batchgen.paged import models
from batchgen.paged.loop import Finished, Loop
from batchgen.paged.pages import SIZE
from batchgen.paged.runner import Runner
from batchgen.paged.scheduler import Scheduler
from batchgen.types import Batch, Prompt

_YIELD_SECONDS = 1.0
_FEED = 256  # prompts tokenised and handed in at once
_SLOTS_ON_CPU = 64
_MOST_SLOTS = 4096
_TYPICAL_TOKENS = 128  # of a row: what the number of slots is worked out from, not a limit
_WIDEST = 1 << 16  # tokens of a sequence, of a model that sets no limit
_STEP_OPERATIONS = 20e12  # of a step with parts of prompts: some 30 ms of an H100, which hides the work of the CPU


class Paged(Engine):
    """A whole model a rank, its rows in flight all the time."""

    serves_cpu = True
    # A step is a graph that the GPU runs by itself, and reads each key and value once (benchmarks/README.md).
    pace = Pace(layer_seconds=0.00003, cache_passes=1.0, cache_passes_eager=1.0, continuous=True)

    @dataclass(frozen=True)
    class Options:
        """Settings of engine `paged`."""

        step_tokens: int | None = None  # most tokens of a forward with parts of prompts; None: by the model's size
        cache_tokens: int | None = None  # of the cache; None: as many as fit
        expected_share: float | None = None  # of its max_new_tokens that a row generates; None: learnt as rows end

        def __post_init__(self) -> None:
            for name in ("step_tokens", "cache_tokens"):
                if getattr(self, name) is not None and getattr(self, name) < 1:
                    raise EngineError(f"--set {name}={getattr(self, name)}: must be 1 or more")
            if self.expected_share is not None and not 0 < self.expected_share <= 1:
                raise EngineError(f"--set expected_share={self.expected_share}: must be above 0 and at most 1")

    def __init__(self, setup: Setup, options: Options) -> None:
        self._loop: Loop | None = None
        self._runner: Runner | None = None
        self._encoder = HfEncoder(setup.model)
        models.check(self._encoder.config)
        loading.check_weights(setup.model)
        loading.prepare_transformers()
        dtype = loading.floating_dtype(setup.dtype, self._encoder.config)
        self._device = loading.device_of(setup.world)
        self._check = setup.selftest
        self._model = loading.load(setup.model, {"dtype": dtype, "device_map": {"": str(self._device)}})
        self._make(setup, options)

    def _make(self, setup: Setup, options: Options) -> None:
        """Runner and scheduler, in the memory that there is."""
        token = memory.cache_bytes_per_token(self._encoder.config, self._model.dtype.itemsize)
        slots = setup.batch_size or _slots(
            memory.free_bytes([self._device], setup.world.local_size), token, self._device
        )
        parameters = sum(one.numel() for one in self._model.parameters())
        budget = options.step_tokens or min(8192, max(2048, int(_STEP_OPERATIONS / 2 / parameters)))
        width = min(self._encoder.context or _WIDEST, options.cache_tokens or _WIDEST)
        runner = Runner(self._model, slots=slots, columns=-(-width // SIZE), budget=budget)
        if self._device.type == "cuda":
            free = runner.free_bytes()
        else:  # half of what is free, or what all slots can need
            free = min(memory.host_free_bytes() // 2 // setup.world.local_size, slots * width * token)
        pages = free // (token * SIZE)
        if options.cache_tokens is not None:
            pages = min(pages, -(-options.cache_tokens // SIZE))
        if pages < 1:
            raise EngineError(
                "beside the model there is no room for a cache; use a smaller --dtype, fewer rows (--batch-size), or "
                "--engine accelerate, which can put weights elsewhere"
            )
        runner.allocate(pages)
        self._runner, self._rows = runner, slots
        self._schedule = partial(
            Scheduler,
            slots=slots,
            width=width,
            budget=budget,
            expected=options.expected_share,
        )

    @property
    def preemptions(self) -> int:
        """Rows that were put back, since too many had been let in, by the last `generate`."""
        return self._scheduler.preemptions

    @classmethod
    def placements(cls, config: Any, weights: Any, gpus: int) -> list[Placement]:
        return [Placement((), gpus, gpus, device=weights.read_bytes)] if models.covers(config) else []

    @classmethod
    def encoder(cls, model: str) -> Encoder:
        return HfEncoder(model)

    def generate(self, prompts: Iterator[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        if self._runner is None:
            raise EngineError("this engine is closed")
        self._scheduler = self._schedule(pages=self._runner.pages)
        self._loop = loop = Loop(
            self._scheduler,
            self._runner,
            device=self._device,
            end_tokens=frozenset(self._encoder.end_tokens),
            watch=self._watch,
            check=self._selftest if self._check else None,
            enough=lambda rows: len(selftest.choose([row.prompt for row in _long(rows)])) == selftest.ROWS,
            count=self._count,
        )
        loop.start()
        try:
            yield from self._drive(loop, prompts, stop)
        finally:
            loop.stop()
            self._loop = None

    def _drive(self, loop: Loop, prompts: Iterator[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        """Feeds the loop and hands over what has finished, about once a second."""
        ahead = 2 * self._rows + _FEED
        more = True
        collected: list[Finished] = []
        handed = time.monotonic()
        while not stop():
            while more and loop.waiting < ahead and not stop():
                fed = list(islice(prompts, _FEED))
                loop.give(fed)
                more = bool(fed)
            found = loop.finished(timeout=0.05)
            collected += found or []
            if collected and (found is None or time.monotonic() - handed >= _YIELD_SECONDS):
                yield self._batch(collected)
                collected, handed = [], time.monotonic()
            if found is None:
                return
        if collected:
            yield self._batch(collected)

    def _batch(self, rows: list[Finished]) -> Batch:
        generations = [
            memory.refuse(row.prompt)
            if row.tokens is None
            else generation(row.prompt, row.tokens, row.stopped, self._encoder, row.logprobs)
            for row in rows
        ]
        return Batch(generations, 0, memory.take_peak_bytes([self._device]))

    def _selftest(self, rows: list[Finished]) -> None:
        rows = _long(rows) or rows
        for place in selftest.choose([row.prompt for row in rows]):
            prompt, tokens = rows[place].prompt, rows[place].tokens or []
            selftest.check(self._model, prompt, tokens, self._rows, self._device, self._encoder.decode)

    def _watch(self, prompt: Prompt) -> StopTexts:
        encoder = self._encoder
        return StopTexts([prompt], encoder.end_tokens, encoder.decode, encoder.special_tokens)

    def _count(self, tokens: int) -> None:
        self.generated_tokens += tokens
        self.steps += 1

    def close(self) -> None:
        if self._loop is not None:
            self._loop.stop()
        self._loop = self._model = self._runner = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _long(rows: list[Finished]) -> list[Finished]:
    """Those whose text says something about decoding: one that ends at once is all prefill."""
    return [row for row in rows if len(row.tokens or ()) >= selftest.TOKENS // 2]


def _slots(free: int, token: int, device: torch.device) -> int:
    """Most rows at once, when nobody has said."""
    if device.type == "cpu":
        return _SLOTS_ON_CPU
    slots = min(_MOST_SLOTS, free // (token * _TYPICAL_TOKENS))
    return max(64, slots // 64 * 64)
