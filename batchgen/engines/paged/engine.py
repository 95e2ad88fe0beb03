"""Engine `paged`: continuous batching over a paged cache, on one GPU a rank or on the CPU.

Rows enter and leave the batch one by one, so that a short row never waits for a long one and nothing is padded. Every
rank holds a whole model and is a stream of its own; with `tp`, the ranks of a group hold one model together and are one
stream, whose steps the first of them plans.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch

from batchgen import device, tensor_parallel
from batchgen.engine import Engine, EngineError, Pace, Peers, Placement, Setup, Stream, Tokenizer
from batchgen.engines.paged import adapters, models, sizing, warm_up, weights
from batchgen.engines.paged.alone import Alone
from batchgen.engines.paged.cache import check_device, find_format
from batchgen.engines.paged.finished_rows import FinishedRow, StepReader, make_generations
from batchgen.engines.paged.first_rows import FirstRows
from batchgen.engines.paged.limits import Room, choose_limits
from batchgen.engines.paged.lockstep import Follower, Leader
from batchgen.engines.paged.loop import PROMPTS_AT_ONCE, Loop
from batchgen.engines.paged.models import trial
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.runner import Runner
from batchgen.engines.paged.scheduler import Scheduler
from batchgen.engines.paged.step import StepLimits
from batchgen.generation import finite
from batchgen.generation.choosing import TokenChooser
from batchgen.generation.selftest import SelfTest
from batchgen.models import loading
from batchgen.models.tokenizer import HfTokenizer, tokenizer_of
from batchgen.types import Batch, Prompt
from batchgen.world import World

_YIELD_SECONDS = 1.0


class Paged(Engine):
    """A whole model a rank, or a group, its rows in flight all the time."""

    serves_cpu = takes_adapters = keeps_quantised = True
    reads_split = ("float32", "bfloat16", "float16")
    group_setting = "tp"
    dtypes = (*Engine.dtypes, *weights.DTYPES)
    # A step is a graph that the GPU runs by itself, and reads each key and value once (benchmarks/README.md).
    pace = Pace(
        layer_seconds=0.00003,
        host_layer_seconds=0.001,
        shared_layer_seconds=0.00009,
        read_share=0.85,
        cache_passes=1.0,
        cache_passes_eager=1.0,
        continuous=True,
        page_size=PAGE_SIZE,
    )

    @dataclass(frozen=True)
    class Options:
        """Settings of engine `paged`."""

        step_tokens: int | None = None  # most tokens of a step with prefill chunks; None: by the model's size
        cache_tokens: int | None = None  # that the KV cache holds; None: as many as fit
        expected_share: float | None = None  # of its max_new_tokens that a row generates; None: learnt as rows end
        tp: int | None = None  # ranks that hold one model together; None: each has a whole one
        kv_dtype: Literal["auto", "fp8"] = "auto"  # of keys and values in the cache; auto: that of the model
        group_size: int | None = None  # with --dtype int4, columns that share a scale; None: 128, 64 or 32
        timeout_seconds: float = 600.0  # without an answer from a rank of the group, the others end

        def __post_init__(self) -> None:
            for name in ("step_tokens", "cache_tokens"):
                if getattr(self, name) is not None and getattr(self, name) < 1:
                    raise EngineError(f"--set {name}={getattr(self, name)}: must be 1 or more")
            weights.check_group_size(self.group_size)
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
        weights.make_scheme(setup.dtype, options.group_size, tokenizer.config)
        if cls.will_call_together(options):
            tensor_parallel.check_split(tokenizer.config, options.tp or 1, evenly=True)

    @classmethod
    def stream(cls, world: World, options: Options) -> Stream:
        return tensor_parallel.stream_of(world, options.tp or 1)

    def __init__(self, setup: Setup, options: Options) -> None:
        self._setup, self._options = setup, options
        self._loop: Loop | None = None
        self._runner: Runner | None = None
        self._group: tensor_parallel.Group | None = None  # of ranks that hold the model together; None: this one alone
        self._tokenizer = tokenizer_of(setup)
        self._scheme = weights.make_scheme(setup.dtype, options.group_size, self._tokenizer.config)
        models.check(self._tokenizer.config)
        loading.prepare_transformers()
        self.calls_together = self.will_call_together(options)
        if self.calls_together:
            try:
                self._load_shard()
            except BaseException:
                self.close()
                raise
            self.signs.timeout_seconds = options.timeout_seconds
            return
        loading.check_weights(setup.model)
        self._device = loading.device_of(setup.world)
        if self._device.type == "cuda":
            self._load()
            return
        # The threads that compute for this one end with it. More than cores would not wait awake for the next product.
        with ThreadPoolExecutor(1) as apart:
            apart.submit(self._load).result()

    def _load(self) -> None:
        """Loads the whole model on this rank's device."""
        dtype, config = self._check_model(), self._tokenizer.config
        self._model = weights.load(
            self._setup, config, self._device, self._scheme, dtype, self._compile_meanwhile(dtype)
        )
        adapters.install(self._model, self._setup.adapters, config)
        self._make_ready()

    def _compile_meanwhile(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Compiles what steps need on a GPU, while weights are read; the check of the model would be slow beside it."""
        if self._device.type != "cuda" or self._setup.adapters:  # the layers with adapters compute something else
            return nullcontext()
        choose = partial(self._choose_limits, Alone(), dtype)
        return warm_up.compile_meanwhile(warm_up.Subject(self._tokenizer.config, dtype, self._device, choose))

    def _load_shard(self) -> None:
        """Joins the group of this rank, and loads its shard of the model."""
        world, config = self._setup.world, self._tokenizer.config
        self.signs.awaited_ranks = ranks = tensor_parallel.ranks_of_group(world, self._options.tp)
        tensor_parallel.check_split(config, len(ranks), evenly=True)
        self._group = tensor_parallel.Group.meet(world, ranks, self._options.timeout_seconds)
        self._device = self._group.device
        self._check_model()
        self._model = tensor_parallel.load_shard(self._setup, config, self._group, scheme=self._scheme)
        tensor_parallel.use_plain_layers(self._model, self._group.model)
        weights.finish(self._model)
        find_cuts = partial(tensor_parallel.find_layer_cuts, self._setup.model, self._group)
        adapters.install(self._model, self._setup.adapters, config, find_cuts)

    def _check_model(self) -> torch.dtype:
        """Checks that a small model of the config computes right, before weights are read; returns the type to use."""
        dtype = weights.choose_dtype(self._scheme, self._setup.dtype, self._tokenizer.config, self._device)
        check_device(self._options.kv_dtype, self._device)
        trial.check(self._tokenizer.config)
        return dtype

    def _make_ready(self) -> Runner:
        """The runner; ranks of a group make it at the same time, with collectives that may take long."""
        if self._runner is None:
            timeout_seconds, self.signs.timeout_seconds = self.signs.timeout_seconds, None
            self._runner = self._make_runner(self._group or Alone())
            self.signs.timeout_seconds = timeout_seconds
        return self._runner

    def _make_runner(self, peers: Peers) -> Runner:
        """The runner, with as large a cache as there is memory for."""
        free = device.free_bytes([self._device], self._setup.world.local_size)
        parameters = sum(parameter.numel() for parameter in self._model.parameters())
        limits = self._choose_limits(peers, self._model.dtype, parameters, free)
        chooser = self._make_chooser(limits) if peers.place == 0 else None
        runner = Runner(self._model, limits, peers, chooser)
        if self._device.type == "cuda":
            free = runner.measure_free_bytes()
        else:  # or what all slots can need
            free = min(free // sizing.SHARE_OF_HOST, limits.slots * limits.sequence_tokens * runner.token_bytes)
        pages = peers.least(free // (runner.token_bytes * PAGE_SIZE))
        runner.allocate(sizing.choose_pages(pages, self._options.cache_tokens, self._setup.limits))
        return runner

    def _choose_limits(self, peers: Peers, dtype: torch.dtype, parameters: int, free: int) -> StepLimits:
        room = Room(parameters, find_format(self._options.kv_dtype, dtype), free, self._device)
        return choose_limits(self._setup, self._options, self._tokenizer, room, peers)

    def _make_chooser(self, limits: StepLimits) -> TokenChooser:
        text = self._model.config.get_text_config()
        return TokenChooser(limits.slots, text.vocab_size, self._tokenizer, self._device)

    @property
    def preemptions(self) -> int:
        """How often the last `generate` has preempted a row, since too many had been admitted."""
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
        if self._group is None:
            yield from self._lead(prompts, stop, None)
            return
        # Here, where it is watched: another rank may read for much longer, or stand still.
        self._group.await_loaded(stop)
        if not self._group.any_rank(stop()):
            yield from self._generate_together(self._group, prompts, stop)
        self.signs.timeout_seconds, self.signs.is_waiting = None, True
        self._group.await_others(stop)

    def _generate_together(
        self, group: tensor_parallel.Group, prompts: Iterator[Prompt], stop: Callable[[], bool]
    ) -> Iterator[Batch]:
        runner = self._make_ready()
        if group.place == 0:
            leader = Leader(runner, group, self.signs)
            yield from self._lead(prompts, lambda: stop() or leader.must_stop, leader)
            leader.end()
        else:
            Follower(runner, group, self.signs).follow(stop)

    def _lead(self, prompts: Iterator[Prompt], stop: Callable[[], bool], leader: Leader | None) -> Iterator[Batch]:
        """Generates on a rank that plans the steps; on its own, or as the leader of others."""
        runner = self._make_ready()
        self._scheduler = Scheduler(runner.limits, runner.pages, self._options.expected_share, runner.groups)
        assert runner.chooser is not None  # this rank plans the steps
        reader = StepReader(self._scheduler, self._tokenizer, runner.chooser, self.signs)
        test = self._make_selftest(runner, leader) if self._setup.selftest else None
        first_rows = FirstRows(test, leader, runner.limits) if test is not None else None
        self._loop = loop = Loop(self._scheduler, runner, reader, self.signs, first_rows, leader)
        loop.start()
        try:
            yield from self._drive(loop, prompts, stop)
        finally:
            loop.stop()
            self._loop = None
        if loop.error is not None:  # at the moment of a stop, perhaps: the other ranks wait inside that step
            raise loop.error

    def _make_selftest(self, runner: Runner, leader: Leader | None) -> SelfTest:
        decode, limits = self._tokenizer.decode, runner.limits
        test = SelfTest(self._model, self._device, decode, limits.slots, leader is None, runner.compute_alone)
        return replace(test, rounds_cache=limits.kv_dtype != "auto")

    def _drive(self, loop: Loop, prompts: Iterator[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        """Submits prompts to the loop, and yields what has finished about once a second."""
        has_more = True
        collected: list[FinishedRow] = []
        yielded_at = time.monotonic()
        while not stop():
            while has_more and loop.needs_prompts and not stop():
                submitted = list(islice(prompts, PROMPTS_AT_ONCE))
                loop.submit(submitted)
                has_more = bool(submitted)
            with loading.refuse_model(self._tokenizer.config, lambda: loop.has_generated):
                finished = loop.collect(timeout=0.05)
            collected += finished or []
            if collected and (finished is None or time.monotonic() - yielded_at >= _YIELD_SECONDS):
                yield self._make_batch(collected, loop.most_running)
                collected, yielded_at = [], time.monotonic()
            if finished is None:
                return
        if collected:
            yield self._make_batch(collected, loop.most_running)

    def _make_batch(self, rows: list[FinishedRow], at_once: int) -> Batch:
        dtype = finite.dtype_of(self._model)
        generations = make_generations(rows, self._tokenizer, dtype)
        return Batch(generations, 0, device.take_peak_bytes([self._device]), at_once=at_once)

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
