"""What a model takes of a machine, and how long a step takes there.

A decode step is made of work around the layers, Python's for the most part; of products, the cache and sums over ranks;
and of weights that come from far. These overlap in part, so that a step takes less than their sum and more than the
longest. What an engine is slow at is in its own file (`Pace`); the constants here were fitted to the cells in
benchmarks/h100, and hosts of the same kind differ by a factor of 1.5 in Python's part.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from batchgen.engine import Pace, Placement
from batchgen.engines.ds_zero import quantization
from batchgen.models.footprint import CacheFormat, Execution, Footprint
from batchgen.models.parameters import Parameters, list_parameters
from batchgen.models.quantised.rounding import Scheme
from batchgen.models.quantised.sizes import find_stored, round_parameters
from batchgen.planning.description import describe_model
from batchgen.planning.hardware import Card

_CONTEXT_BYTES = int(1.0e9)  # of a CUDA context, cuBLAS's workspaces and a reserve
_PRODUCTS = 0.8  # of the arithmetic that one large product reaches: those of a step are many, and some are small
_LINK = 0.87  # of the host's link that DeepSpeed's copies reach
_HOST_SUMS = 0.0005  # s a layer, of ranks on CPUs that wait for each other: a guess, so that none do that needlessly
_COPY_PASSES = 3.0  # the experts that `generate` copies for each row on a GPU are read, written and read again
_GROUP = 64  # weights that share a scale, where bitsandbytes rounds them
# Of `torch._scaled_mm` beside products in bfloat16, by the tokens from which it holds; measured on an H200, where 4096
# by 28672 took 135 us with 256 rows and 602 us with 2,048.
_FP8_GAINS = ((512, 1.7), (256, 1.3))
_OVERLAP = 1.75  # the parts of a step add up as numbers to this power do: 1 is a plain sum, infinity the longest alone


@dataclass(frozen=True, slots=True)
class Node:
    """The machine that the run is for, or several like it."""

    card: Card
    gpus: int  # of all hosts; where there are none, ranks
    host_memory: int | None = None  # bytes, of all hosts; None: not known
    disk_bandwidth: float = 2e9  # bytes/s of a local disk's reads
    hosts: int = 1

    @property
    def room(self) -> int:
        """Bytes of a device that a run can use."""
        return self.card.memory - _CONTEXT_BYTES

    @property
    def device(self) -> str:
        """What a rank computes on."""
        return "GPU" if self.card.gpu else "rank's share of the host"


@dataclass(frozen=True)
class Model:
    """A model from its config alone."""

    config: Any
    dtype: torch.dtype  # that it computes in
    whole: Parameters = field(repr=False)  # each of that type
    weights: Parameters = field(repr=False)  # as they are held
    stored: str = ""  # how their numbers are, as `--dtype` calls it, if they are not of the type computed in
    cache: CacheFormat | None = None  # how its KV cache is kept; None: in the type that is computed in
    is_quantised: bool = False  # its checkpoint has the weights as `stored`

    @classmethod
    def of(
        cls,
        config: Any,
        dtype: torch.dtype,
        stored: str = "",
        *,
        group_size: int = 0,
        cache: CacheFormat | None = None,
    ) -> Model:
        """A model with weights of type `dtype`.

        Args:
            stored: fp8, int8, int4 or nf4, which its matrices are rounded to; "": as its checkpoint has them.
            group_size: as `round_parameters` takes it.
        """
        whole = list_parameters(config, dtype)
        if stored == "nf4":
            return cls(config, dtype, whole, quantization.plan_quantized(whole, 4, _GROUP), stored, cache)
        scheme = Scheme.of(stored)
        kind = find_stored(config) if scheme is None else scheme.kind
        weights = round_parameters(whole, kind, group_size)
        return cls(config, dtype, whole, weights, kind, cache, is_quantised=bool(kind) and scheme is None)

    @property
    def widened(self) -> Model:
        """The same with weights of the type that is computed in."""
        return replace(self, weights=self.whole, stored="", is_quantised=False)

    def __str__(self) -> str:
        """The model's size in words."""
        return describe_model(self.whole, self.footprint, self.cache)

    @property
    def layers(self) -> int:
        """How many layers the decoder has."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def eager(self) -> bool:
        """Whether its attention writes out scores: BLOOM's position biases have no other."""
        return str(self.config.model_type) == "bloom"

    @cached_property
    def footprint(self) -> Footprint:
        """The sizes that decide what a row takes."""
        return Footprint.of(self.config)

    def row_bytes(self, prompt: int, new: int, execution: Execution) -> int:
        """The bytes of one row, on each of the devices that share it."""
        return self.footprint.row_bytes(prompt, new, execution)

    def cache_bytes(self, tokens: float) -> float:
        """The bytes of the KV cache that the next token of a row of `tokens` tokens reads, on all devices together.

        In a layer with a window these are no more than those of the window.
        """
        return self.footprint.cache_bytes(round(tokens), Execution(self.dtype.itemsize, cache=self.cache))


@dataclass(frozen=True)
class Speed:
    """How fast an engine is with a model on a node, by the way it holds the model."""

    pace: Pace
    placement: Placement
    model: Model
    node: Node

    def step(self, rows: int, context: float) -> tuple[float, str]:
        """Seconds of a decode step of `rows` rows of `context` tokens, and what most of it goes to."""
        placement, card, pace = self.placement, self.node.card, self.pace
        together = self._together
        read = self._read_seconds(rows)
        passes = pace.cache_passes_eager if self.model.eager else pace.cache_passes
        cache = passes * rows * self.model.cache_bytes(context) / together / card.bandwidth
        moved = 0.0
        if placement.path == "disk":
            moved = placement.moved * placement.ranks / self.node.disk_bandwidth  # all ranks read the same disk
        elif placement.path:
            moved = placement.moved / (_LINK * card.host_link if placement.path == "host" else card.gpu_link)
        shared = (together > 1 or placement.gathered > 0) and pace.shared_layer_seconds is not None
        work = (pace.shared_layer_seconds or 0.0) if shared else pace.layer_seconds
        if not card.gpu:
            work = max(work, pace.host_layer_seconds) + (_HOST_SUMS if together > 1 else 0.0)
        times = {
            "overhead of the layers": work * self.model.layers,
            "products and cache": max(read, self._matmul_seconds(rows)) + cache + self._sums(rows),
            f"weights from the {placement.path}": moved,
        }
        bound = max(times, key=lambda part: times[part])
        overlap = _OVERLAP if card.gpu else 1.0
        return sum(seconds**overlap for seconds in times.values()) ** (1 / overlap), bound

    def prefill(self, tokens: float) -> float:
        """Seconds of this many tokens of prompts."""
        return self._matmul_seconds(tokens) + self._sums(tokens)

    @property
    def execution(self) -> Execution:
        """How rows are computed and held, as far as their memory depends on it."""
        return Execution(
            self.model.dtype.itemsize,
            ranks=self.placement.sharing,
            eager=self.model.eager,
            page_size=self.pace.page_size,
            copies_experts=self._copies_experts,
            cache=self.model.cache,
        )

    @property
    def _copies_experts(self) -> bool:
        """Whether each row of a decode step has a copy of its experts, as Transformers' `generate` makes it on a GPU.

        An engine whose rows come and go calls the model itself, and reads experts where they lie.
        """
        return self.node.card.gpu and not self.pace.continuous

    def _read_seconds(self, rows: int) -> float:
        """Seconds in which a decode step of `rows` rows reads the weights; where experts are copied, these too."""
        weights, bandwidth = self.model.weights, self._together * self.node.card.bandwidth
        if not self._copies_experts:
            return weights.step_bytes(rows) / (self.pace.read_share * bandwidth)
        size = weights.dtype.itemsize
        copied = _COPY_PASSES * rows * weights.active_experts * size
        return (weights.total - weights.experts) * size / (self.pace.read_share * bandwidth) + copied / bandwidth

    @property
    def _together(self) -> int:
        """Devices that compute a layer at once."""
        return 1 if self.placement.in_turn else self.placement.sharing

    def _matmul_seconds(self, tokens: float) -> float:
        """Seconds of all matrix products over this many tokens."""
        operations = 2 * self.model.whole.active * tokens
        return operations / self._together / (_PRODUCTS * self.node.card.operations * self._find_gain(tokens))

    def _find_gain(self, tokens: float) -> float:
        """How much faster products are than in 16 bits: those of 8-bit floats, from some hundred tokens on."""
        if self.model.stored != "fp8" or not self.node.card.gpu:
            return 1.0
        return next((gain for least, gain in _FP8_GAINS if tokens >= least), 1.0)

    def _sums(self, tokens: float) -> float:
        """Seconds of the sums over the ranks that share a layer: two a layer, of what it makes of this many tokens."""
        devices = self._together
        size = 2 * self.model.layers * self.model.config.get_text_config().hidden_size * self.model.dtype.itemsize
        # Each device sends this share of it, twice: "Bandwidth optimal all-reduce algorithms" (Patarasuk, Yuan, 2009).
        return float(size * tokens * 2 * (devices - 1) / devices / self.node.card.gpu_link)
