"""Engine `ds-inference`: tensor parallelism. A group of ranks shares every matrix of one model and every batch.

DeepSpeed's AutoTP splits the model; each rank reads its own share of the files and nothing else. A group is a stream:
its ranks take the same prompts through the same steps, and its first rank writes. Before each step they agree whether
one of them was asked to stop, and on the first rank's tokens. Groups know nothing of each other until all have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from batchgen import device, tensor_parallel
from batchgen.engine import Engine, EngineError, Pace, Placement, Setup, Stream, Tokenizer
from batchgen.generation.greedy import LoadedModel
from batchgen.generation.sizing import BatchSizing
from batchgen.generation.static_batches import StaticBatches
from batchgen.models import loading
from batchgen.models.quantised.places import widen_all
from batchgen.models.tokenizer import HfTokenizer, tokenizer_of
from batchgen.tensor_parallel import process_group
from batchgen.types import Batch, Prompt
from batchgen.world import World


class DsInference(Engine):
    """Holds a share of every matrix on each rank of a group. Each group is a stream."""

    calls_together = True
    needed_packages = ("deepspeed",)
    reads_split = ("float32", "bfloat16", "float16", "int8")
    group_setting = "tp"
    dtypes = (*Engine.dtypes, "int8")
    # Of two H100s: 40 to 64 ms for the 30 layers of BLOOM-7b1, with two all-reduces each.
    pace = Pace(layer_seconds=0.00064, shared_layer_seconds=0.0016)

    @dataclass(frozen=True)
    class Options:
        """Settings of engine `ds-inference`."""

        tp: int | None = None  # ranks that share a model; None: all of the run's
        attn_implementation: str | None = None  # None: Transformers' choice
        timeout_seconds: float = 600.0  # without an answer from a rank of the group, the others end

    @classmethod
    def check(cls, setup: Setup, tokenizer: Any, options: Options) -> None:
        super().check(setup, tokenizer, options)
        if (size := len(tensor_parallel.ranks_of_group(setup.world, options.tp))) > 1:
            tensor_parallel.check_split(tokenizer.config, size)

    @classmethod
    def stream(cls, world: World, options: Options) -> Stream:
        return tensor_parallel.stream_of(world, options.tp)

    @classmethod
    def placements(cls, config: Any, weights: Any, gpus: int) -> list[Placement]:
        return tensor_parallel.placements(config, weights, gpus)

    @classmethod
    def tokenizer(cls, model: str) -> Tokenizer:
        return HfTokenizer(model)

    def __init__(self, setup: Setup, options: Options) -> None:
        self._batches: StaticBatches | None = None
        self.signs.awaited_ranks = ranks = tensor_parallel.ranks_of_group(setup.world, options.tp)
        tokenizer = tokenizer_of(setup)
        if len(ranks) > 1:
            tensor_parallel.check_split(tokenizer.config, len(ranks))
        loading.prepare_transformers()
        try:
            self._group = group = tensor_parallel.Group.meet(
                setup.world, self.signs.awaited_ranks, options.timeout_seconds
            )
            model = tensor_parallel.load_shard(setup, tokenizer.config, group, options.attn_implementation)
            widen_all(model)
        except BaseException:
            self.close()
            raise
        sizing = BatchSizing(setup.batch_size, local_size=setup.world.local_size, limits=setup.limits, reserve=True)
        self._batches = StaticBatches(
            LoadedModel(model, tokenizer, group.device),
            sizing,
            self.signs,
            counts_steps=False,  # the ranks agree on each step, and count it there
            check=setup.selftest,
            # A rank that is alone makes a smaller batch by itself, whatever it ran out of memory in.
            peers=group if group.count > 1 else None,
        )
        self.signs.timeout_seconds = options.timeout_seconds if len(ranks) > 1 else None

    def generate(self, prompts: Iterator[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        if self._batches is None:
            raise EngineError("this engine is closed")

        def any_stop() -> bool:
            self.signs.steps += 1
            return self._group.any_rank(stop())

        self._group.await_loaded(stop)
        yield from self._batches.run(prompts, any_stop)
        self.signs.timeout_seconds, self.signs.is_waiting = None, True
        self._group.await_others(stop)

    def abandon(self) -> None:
        process_group.abandon()

    def close(self) -> None:
        self._batches = None
        device.release()
        process_group.leave()
