"""Engine `paged`: continuous batching over a paged cache, on one GPU a rank or on the CPU.

Rows enter and leave the batch one by one, so that a short row never waits for a long one and nothing is padded. Every
rank holds a whole model and is a stream of its own; with `tp`, the ranks of a group hold one model together and are one
stream, whose steps the first of them plans.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from batchgen import device, tensor_parallel
from batchgen.engine import Engine, EngineError, Pace, Placement, Setup, Stream, Tokenizer
from batchgen.engines.paged import models, pages, sizing
from batchgen.engines.paged.finished import Finished, generation_of, long_enough
from batchgen.engines.paged.lockstep import Leader, Peers, follow
from batchgen.engines.paged.loop import Loop
from batchgen.engines.paged.runner import Runner
from batchgen.engines.paged.scheduler import Scheduler
from batchgen.generation import finite, selftest
from batchgen.generation.stopping import StopTexts
from batchgen.models import footprint, loading
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Batch, Prompt
from batchgen.world import World

_YIELD_SECONDS = 1.0
_FEED = 256  # prompts tokenised and handed in at once
_WIDEST = 1 << 16  # tokens of a sequence, of a model that sets no limit
_STEP_OPERATIONS = 20e12  # of a step with parts of prompts: some 30 ms of an H100, which hides the work of the CPU


class Paged(Engine):
    """A whole model a rank, or a group, its rows in flight all the time."""

    serves_cpu = reads_split = True
    # A step is a graph that the GPU runs by itself, and reads each key and value once (benchmarks/README.md).
    pace = Pace(
        layer_seconds=0.00003,
        host_layer_seconds=0.001,
        shared_layer_seconds=0.00009,
        read_share=0.85,
        cache_passes=1.0,
        cache_passes_eager=1.0,
        continuous=True,
    )

    @dataclass(frozen=True)
    class Options:
        """Settings of engine `paged`."""

        step_tokens: int | None = None  # most tokens of a forward with parts of prompts; None: by the model's size
        cache_tokens: int | None = None  # of the cache; None: as many as fit
        expected_share: float | None = None  # of its max_new_tokens that a row generates; None: learnt as rows end
        tp: int | None = None  # ranks that share a model; None: each has a whole one
        timeout_seconds: float = 600.0  # without an answer from a rank of the group, the others end

        def __post_init__(self) -> None:
            for name in ("step_tokens", "cache_tokens"):
                if getattr(self, name) is not None and getattr(self, name) < 1:
                    raise EngineError(f"--set {name}={getattr(self, name)}: must be 1 or more")
            if self.expected_share is not None and not 0 < self.expected_share <= 1:
                raise EngineError(f"--set expected_share={self.expected_share}: must be above 0 and at most 1")

    @classmethod
    def will_call_together(cls, options: Options) -> bool:
        return (options.tp or 1) > 1

    @classmethod
    def packages(cls, options: Options, dtype: str) -> Sequence[str]:
        return ("deepspeed",) if cls.will_call_together(options) else ("accelerate",)

    @classmethod
    def check(cls, setup: Setup, tokenizer: Any, options: Options) -> None:
        super().check(setup, tokenizer, options)
        models.check(tokenizer.config)
        if cls.will_call_together(options):
            tensor_parallel.check_split(tokenizer.config, options.tp or 1, evenly=True)

    @classmethod
    def stream(cls, world: World, options: Options) -> Stream:
        return tensor_parallel.stream_of(world, options.tp or 1)

    def __init__(self, setup: Setup, options: Options) -> None:
        self._loop: Loop | None = None
        self._runner: Runner | None = None
        self._group: tensor_parallel.Group | None = None
        self._peers: Peers | None = None
        self._tokenizer = HfTokenizer(setup.model)
        models.check(self._tokenizer.config)
        loading.prepare_transformers()
        self._check = setup.selftest
        self._make_ready = partial(self._make, setup, options)
        self.calls_together = self.will_call_together(options)
        if self.calls_together:
            try:
                self._join(setup, options)
            except BaseException:
                self.close()
                raise
            self.signs.timeout_seconds = options.timeout_seconds
            return
        loading.check_weights(setup.model)
        self._device = loading.device_of(setup.world)
        if self._device.type == "cuda":
            self._load(setup)
            return
        # The threads that compute for this one end with it. More than cores would not wait awake for the next product.
        with ThreadPoolExecutor(1) as apart:
            apart.submit(self._load, setup).result()

    def _load(self, setup: Setup) -> None:
        dtype = loading.floating_dtype(setup.dtype, self._tokenizer.config)
        self._model = loading.load(setup.model, {"dtype": dtype, "device_map": {"": str(self._device)}})
        self._ready()

    def _join(self, setup: Setup, options: Options) -> None:
        """This rank's share of the model, and the others of its group."""
        world, config = setup.world, self._tokenizer.config
        loading.floating_dtype(setup.dtype, config)
        self.signs.awaited_ranks = those = tensor_parallel.ranks_of_group(world, options.tp)
        tensor_parallel.check_split(config, len(those), evenly=True)
        self._group = group = tensor_parallel.Group.meet(world, those, options.timeout_seconds)
        self._device = group.device
        self._model = tensor_parallel.load(setup, config, group)
        tensor_parallel.plain(self._model, group.model)
        place = world.rank - those.start
        self._peers = Peers(place, len(those), group.tell, group.told, group.any_rank, group.least, group.tokens)

    def _make(self, setup: Setup, options: Options) -> None:
        """Runner and scheduler, in the memory that there is."""
        peers = self._peers or Peers.alone()
        token = footprint.cache_bytes_per_token(self._tokenizer.config, self._model.dtype.itemsize) // peers.count
        free = device.free_bytes([self._device], setup.world.local_size)
        slots = peers.least(setup.batch_size or sizing.slots(free, token, self._device))
        parameters = peers.least(sum(one.numel() for one in self._model.parameters()))
        budget = options.step_tokens or min(8192, max(2048, int(_STEP_OPERATIONS / 2 / parameters)))
        width = min(self._tokenizer.context or _WIDEST, options.cache_tokens or _WIDEST)
        runner = Runner(
            self._model,
            slots=slots,
            columns=-(-width // pages.SIZE),
            budget=budget,
            place=peers.place,
            ranks=peers.count,
            agreed=peers.tokens,
        )
        if self._device.type == "cuda":
            free = runner.free_bytes()
        else:  # or what all slots can need
            free = min(free // sizing.SHARE_OF_HOST, slots * width * token)
        count = peers.least(free // (token * pages.SIZE))
        if options.cache_tokens is not None:
            count = min(count, -(-options.cache_tokens // pages.SIZE))
        count = sizing.after(setup.limits, count)
        if count < 1:
            raise EngineError(
                "beside the model there is no room for a cache; use a smaller --dtype, fewer rows (--batch-size), more "
                "GPUs for a model (--tp), or --engine accelerate, which can put weights elsewhere"
            )
        runner.allocate(count)
        self._runner, self._rows = runner, slots
        self._schedule = partial(Scheduler, slots=slots, width=width, budget=budget, expected=options.expected_share)

    @property
    def preemptions(self) -> int:
        """Rows that were put back, since too many had been let in, by the last `generate`."""
        return self._scheduler.preemptions

    @classmethod
    def placements(cls, config: Any, weights: Any, gpus: int) -> list[Placement]:
        if not models.covers(config):
            return []
        return tensor_parallel.placements(config, weights, gpus, evenly=True, whole=())

    @classmethod
    def tokenizer(cls, model: str) -> Tokenizer:
        return HfTokenizer(model)

    def generate(self, prompts: Iterator[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        if self._model is None:
            raise EngineError("this engine is closed")
        if self._peers is None or self._group is None:
            yield from self._plan(self._ready(), prompts, stop, None)
            return
        # Here, where it is watched: another rank may read for much longer, or stand still.
        self._group.await_loaded(stop)
        if not self._peers.any_rank(stop()):
            yield from self._together(self._peers, prompts, stop)
        self.signs.timeout_seconds, self.signs.is_waiting = None, True
        self._group.await_others(stop)

    def _together(self, peers: Peers, prompts: Iterator[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        runner = self._ready()
        if peers.place == 0:
            leader = Leader(runner, peers, self._step, self._hear)
            yield from self._plan(runner, prompts, lambda: stop() or leader.asked_to_stop, leader)
            leader.end()
        else:
            look = partial(selftest.logits_of, self._model, device=self._device)
            follow(runner, peers, look, stop, self._step, self._hear)

    def _ready(self) -> Runner:
        """What runs the steps; ranks of a group make it at the same time, with collectives that may take long."""
        if self._runner is None:
            patience, self.signs.timeout_seconds = self.signs.timeout_seconds, None
            self._make_ready()
            self.signs.timeout_seconds = patience
        assert self._runner is not None
        return self._runner

    def _plan(
        self, runner: Runner, prompts: Iterator[Prompt], stop: Callable[[], bool], leader: Leader | None
    ) -> Iterator[Batch]:
        self._scheduler = self._schedule(pages=runner.pages)
        self._loop = loop = Loop(
            self._scheduler,
            runner,
            device=self._device,
            end_tokens=frozenset(self._tokenizer.end_tokens),
            watch=self._watch,
            check=partial(self._selftests, leader) if self._check else None,
            enough=lambda rows: len(selftest.choose([row.prompt for row in long_enough(rows)])) == selftest.ROWS,
            count=self._count,
            leader=leader,
        )
        loop.start()
        try:
            yield from self._drive(loop, prompts, stop)
        finally:
            loop.stop()
            self._loop = None
        if loop.error is not None:  # at the moment of a stop, perhaps: the other ranks wait inside that step
            raise loop.error

    def _drive(self, loop: Loop, prompts: Iterator[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        """Feeds the loop and hands over what has finished, about once a second."""
        ahead = 2 * self._rows + _FEED
        collected: list[Finished] = []
        more, handed = True, time.monotonic()
        while not stop():
            while more and loop.waiting < ahead and not stop():
                fed = list(islice(prompts, _FEED))
                loop.give(fed)
                more = bool(fed)
            with loading.refuse_model(self._tokenizer.config, lambda: loop.has_generated):
                found = loop.finished(timeout=0.05)
            collected += found or []
            if collected and (found is None or time.monotonic() - handed >= _YIELD_SECONDS):
                yield self._batch(collected, loop.most_running)
                collected, handed = [], time.monotonic()
            if found is None:
                return
        if collected:
            yield self._batch(collected, loop.most_running)

    def _batch(self, rows: list[Finished], at_once: int) -> Batch:
        generations = [generation_of(row, self._tokenizer, finite.dtype_of(self._model)) for row in rows]
        return Batch(generations, 0, device.take_peak_bytes([self._device]), at_once=at_once)

    def _selftests(self, leader: Leader | None, rows: list[Finished]) -> None:
        rows = long_enough(rows) or rows
        test = selftest.SelfTest(self._model, self._device, self._tokenizer.decode, self._rows, measures=leader is None)
        for place in selftest.choose([row.prompt for row in rows]):
            prompt, tokens = rows[place].prompt, rows[place].tokens or []
            if leader is not None:
                leader.look(prompt.tokens, tokens)
            test.check(prompt, tokens)

    def _watch(self, prompt: Prompt) -> StopTexts:
        return StopTexts.of([prompt], self._tokenizer)

    def _count(self, tokens: int) -> None:
        self.signs.generated_tokens += tokens
        if self._peers is None:
            self._step()

    def _step(self) -> None:
        self.signs.steps += 1

    def _hear(self) -> None:
        self.signs.idle_reports += 1

    def abandon(self) -> None:
        if self.calls_together:
            tensor_parallel.process_group.abandon()

    def close(self) -> None:
        if self._loop is not None:
            self._loop.stop()
        self._loop = self._model = self._runner = None
        device.release()
        if self.calls_together:
            tensor_parallel.process_group.leave()
