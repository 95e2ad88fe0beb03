"""What fits, how large a batch, how long: from a model's config and the lengths of an input. No weights, no GPU.

Memory is counted as the engines count it (`memory.bytes_per_row`, `zero.gathered_bytes`). A decode step takes the
largest of three times: Python's work around the layers; matrix products and the cache; weights that come from far.
The constants were measured on one H100 (benchmarks/README.md), or are a maker's figures where the table says so; cells
of a bench of the same model come before all of that.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from batchgen import engine, memory, offload
from batchgen.engine import Placement
from batchgen.types import UserError

_GIB = 1 << 30
_CONTEXT_BYTES = int(1.0e9)  # of a CUDA context, cuBLAS's workspaces and a reserve
_FULL = 0.99  # what a card has of the memory that it is sold with, in GiB
_PRODUCTS = 0.8  # of the arithmetic that one large product reaches: those of a step are many, and some are small

# Seconds of a step that Python takes for each layer, however few the rows: 20 to 31, 27, and 43 to 55 ms for the 30
# layers of BLOOM-7b1; 12, 13 and 24 to 28 ms for the 24 of BLOOM-560m.
_LAYER_SECONDS = {"accelerate": 0.0008, "ds-inference": 0.0009, "ds-zero": 0.0013}
# How often a step moves the cache: `generate` copies it to make it longer, and attention that writes its scores out
# moves them in several types besides (69 ms at 512 rows of BLOOM-7b1). The other is a count, not measured.
_CACHE_PASSES_EAGER, _CACHE_PASSES = 12.0, 5.0


class PlanError(UserError):
    """There is nothing to plan with: a sentence for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Card:
    """A kind of GPU."""

    memory: int  # bytes
    bandwidth: float  # bytes/s of its memory
    operations: float  # operations/s of a large product in 16 bits
    host_link: float  # bytes/s from pinned host memory
    gpu_link: float  # bytes/s to another GPU of the host
    measured: bool = False  # else nine tenths of what the maker says


CARDS: Mapping[str, Card] = {
    "H100": Card(int(80 * _GIB * _FULL), 2.94e12, 760e12, 52e9, 300e9, measured=True),
    "H200": Card(int(141 * 1e9), 4.3e12, 760e12, 52e9, 300e9),
    "A100-80": Card(int(80 * _GIB * _FULL), 1.8e12, 280e12, 23e9, 200e9),
    "A100-40": Card(int(40 * _GIB * _FULL), 1.4e12, 280e12, 23e9, 200e9),
    "A6000": Card(int(48 * _GIB * _FULL), 0.69e12, 140e12, 23e9, 40e9),
    "L40S": Card(int(48 * _GIB * _FULL), 0.78e12, 330e12, 23e9, 20e9),
    "V100": Card(int(32 * _GIB * _FULL), 0.81e12, 112e12, 11e9, 100e9),
}


@dataclass(frozen=True, slots=True)
class Node:
    """The machine that the run is for."""

    card: Card
    gpus: int
    host_memory: int | None = None  # bytes; None: not known
    disk_bandwidth: float = 2e9  # bytes/s of a local disk's reads

    @property
    def room(self) -> int:
        """Bytes of a GPU that a run can use."""
        return self.card.memory - _CONTEXT_BYTES


@dataclass(frozen=True)
class Work:
    """Rows to generate: those of an input, or a sample of them."""

    lengths: Sequence[tuple[int, int]]  # prompt tokens, new tokens
    rows: int  # that these stand for


@dataclass(frozen=True)
class Model:
    """A model from its config alone."""

    config: Any
    dtype: torch.dtype
    weights: offload.Parameters = field(repr=False)

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> Model:
        """With weights of type `dtype`."""
        return cls(config, dtype, offload.parameters(config, dtype))

    @property
    def layers(self) -> int:
        """Of the decoder."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def eager(self) -> bool:
        """Whether its attention writes out scores: BLOOM's position biases have no other."""
        return str(self.config.model_type) == "bloom"

    def row_bytes(self, prompt: int, new: int, sharing: int) -> int:
        """Of one row, on each of the devices that share it."""
        return memory.bytes_per_row(
            self.config,
            prompt_tokens=prompt,
            new_tokens=new,
            item_bytes=self.dtype.itemsize,
            eager=self.eager,
            ranks=sharing,
        )

    def cache_bytes(self) -> int:
        """Of one token, on all devices together."""
        return memory.cache_bytes_per_token(self.config, self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of an engine."""

    engine: str
    placement: Placement
    why_not: str  # it does not fit; "" if it does
    batch: int = 0  # rows of a stream at once, most, of the longest rows
    device_bytes: int = 0  # at that batch
    tokens_per_second: float = 0.0
    seconds: float = 0.0  # of the whole work, without loading
    bound: str = ""  # what most of a step's time goes to
    measured: bool = False  # from a bench of this model, instead of the formulas


def forecasts(model: Model, work: Work, node: Node, measured: Mapping[str, Mapping[int, float]]) -> list[Forecast]:
    """Every engine's placements, the fastest that fits first.

    Args:
        measured: by system as `bench` names it, seconds of a decode step by batch, of this model on this kind of card.
    """
    found = []
    for name in engine.names():
        kind = engine.find(name)
        for placement in kind.placements(model.config, model.weights, node.gpus):
            system = ":".join([name, *placement.settings])
            # Without a setting, all ranks share a model.
            short = name if placement.sharing == placement.ranks == node.gpus else system
            known = measured.get(system) or measured.get(short) or {}
            found.append(_forecast(name, placement, model, work, node, known))
    return sorted(found, key=lambda one: (bool(one.why_not), one.seconds, -one.batch))


def _forecast(
    name: str, placement: Placement, model: Model, work: Work, node: Node, known: Mapping[int, float]
) -> Forecast:
    longest = max(prompt for prompt, _ in work.lengths), max(new for _, new in work.lengths)
    fixed = placement.device + placement.gathered
    if fixed > node.room:
        return Forecast(name, placement, f"{_gb(fixed)} of weights are more than the {_gb(node.room)} of a GPU")
    batch = _most(placement, model, node, longest)
    if batch == 0:
        row = model.row_bytes(*longest, placement.sharing)
        left = _gb(node.room - fixed)
        return Forecast(name, placement, f"beside {_gb(fixed)} of weights, {left} are left, and a row takes {_gb(row)}")
    if node.host_memory is not None and placement.host > node.host_memory:
        return Forecast(name, placement, f"{_gb(placement.host)} of weights are more than the host's memory")
    seconds, tokens, bounds = 0.0, 0, dict[str, float]()
    for rows, prompt, new in _batches(placement, model, node, work):
        step, bound = _step(name, placement, model, node, rows, prompt + new / 2, known)
        spent = new * step + _products(placement, model, node, rows * prompt)
        seconds, tokens = seconds + spent, tokens + rows * new
        bounds[bound] = bounds.get(bound, 0.0) + spent
    scale = work.rows / len(work.lengths) / placement.streams
    return Forecast(
        name,
        placement,
        "",
        batch,
        fixed + batch * model.row_bytes(*longest, placement.sharing),
        placement.streams * tokens / seconds,
        seconds * scale,
        max(bounds, key=lambda bound: bounds[bound]),
        bool(known),
    )


def _most(placement: Placement, model: Model, node: Node, length: tuple[int, int]) -> int:
    """Rows of that length that fit."""
    room = node.room - placement.device - placement.gathered
    return max(0, room // model.row_bytes(*length, placement.sharing))


def _batches(placement: Placement, model: Model, node: Node, work: Work) -> list[tuple[int, int, int]]:
    """Rows, prompt tokens and new tokens of the batches of all rows: like lengths together, as a run has them."""
    ordered = sorted(work.lengths, key=lambda one: (one[1], one[0]), reverse=True)
    made = []
    place = 0
    while place < len(ordered):
        prompt, new = ordered[place]
        rows = max(1, _most(placement, model, node, (prompt, new)))
        part = ordered[place : place + rows]
        # A sample stands for more rows than it has: its last batch would be full.
        made.append((len(part), max(length for length, _ in part), new))
        place += rows
    return made


def _step(
    name: str, placement: Placement, model: Model, node: Node, rows: int, context: float, known: Mapping[int, float]
) -> tuple[float, str]:
    """Seconds of a decode step, and what they go to."""
    if known:
        return _between(known, rows), "what was measured"
    card, together = node.card, 1 if placement.in_turn else placement.sharing
    size = model.weights.read_bytes / together
    products = max(size / card.bandwidth, _products(placement, model, node, rows))
    passes = _CACHE_PASSES_EAGER if model.eager else _CACHE_PASSES
    cache = passes * rows * context * model.cache_bytes() / together / card.bandwidth
    moved = 0.0
    if placement.path == "disk":
        moved = placement.moved * placement.ranks / node.disk_bandwidth  # all ranks read the same disk
    elif placement.path:
        moved = placement.moved / (card.host_link if placement.path == "host" else card.gpu_link)
    times = {
        "Python's work": _LAYER_SECONDS.get(name, max(_LAYER_SECONDS.values())) * model.layers,
        "products and cache": products + cache,
        f"weights from the {placement.path}": moved,
    }
    bound = max(times, key=lambda one: times[one])
    return times[bound], bound


def _products(placement: Placement, model: Model, node: Node, tokens: int) -> float:
    """Seconds of all matrix products over so many tokens."""
    operations = 2 * model.weights.read_bytes / model.dtype.itemsize * tokens
    together = 1 if placement.in_turn else placement.sharing
    return operations / together / (_PRODUCTS * node.card.operations)


def _between(known: Mapping[int, float], rows: int) -> float:
    """Seconds of a step of `rows` rows, between the nearest that were measured; beyond the last in proportion."""
    batches = sorted(known)
    place = bisect_left(batches, rows)
    if place == len(batches):
        return known[batches[-1]] * rows / batches[-1]
    if place == 0:
        return known[batches[0]]
    (low, high), *_ = [pair for pair in pairwise(batches) if pair[1] == batches[place]]
    share = (rows - low) / (high - low)
    return known[low] + share * (known[high] - known[low])


def card_of(name: str | None, gigabytes: float | None) -> Card:
    """The card called `name`, or the first that has as much memory; with other memory if both are given.

    Raises:
        PlanError: it is not known.
    """
    if name is not None and name not in CARDS:
        raise PlanError(f"the GPU {name} is not known: {', '.join(CARDS)}; or give --gpu-memory")
    if gigabytes is None:
        return CARDS[name or "H100"]
    size = int(gigabytes * _GIB * _FULL)
    near = min(CARDS.values(), key=lambda card: abs(math.log(card.memory / size)))
    card = CARDS[name] if name is not None else near
    return Card(size, card.bandwidth, card.operations, card.host_link, card.gpu_link, card.measured)


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
