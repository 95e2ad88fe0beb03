"""The experts of a mixture over the ranks of a group: each rank's share, and the sum over all.

There are two ways to share them out. *Split*: each rank has a part of every expert, some of its inner numbers.
*Spread*: each rank has some experts whole. Either way a rank's output is a part of the sum, and routers stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from batchgen.tensor_parallel.file_views import Pieces
from batchgen.tensor_parallel.operators import register_group, sum_over_ranks

Way = Literal["split", "spread"]

_TILE = 64  # inner numbers that a tile of a product takes: a part that is no multiple wastes the rest of its last one
_PAIRS = 2048  # of tokens and experts in a layer's step: 256 rows with 8 experts each
_UNEVENNESS = 0.5  # of how often experts are chosen: standard deviation, in means; an assumption, not a measurement


def choose_way(experts: int, inner: int, ranks: int) -> Way:
    """Returns how experts are shared out, whichever is forecast to be faster.

    Args:
        experts: how many a layer has.
        inner: the inner numbers of each.
    """
    return "spread" if forecast_spread(experts, ranks) < forecast_split(inner, ranks) else "split"


def forecast_split(inner: int, ranks: int) -> float:
    """Returns how long the slowest rank takes for its share of split experts, in times of an even share.

    Each rank works on all pairs of tokens and experts, and reads its part of each expert that was chosen, so that
    ranks differ by the size of their parts alone; products are computed in tiles of 64 numbers.
    """
    return -(-max(divide(inner, ranks)) // _TILE) * _TILE * ranks / inner


def forecast_spread(experts: int, ranks: int) -> float:
    """Returns how long the slowest rank takes for its share of experts that are spread, in times of an even share.

    All ranks wait for the one whose experts were chosen most often. Of n pairs that choose by chance, a rank of r gets
    n/r, with a standard deviation of sqrt((1 - 1/r) r/n) of that; experts that are chosen unevenly add theirs, of which
    there are E/r on a rank. The largest of r such numbers lies about sqrt(2 ln r) deviations above the mean.
    """
    if experts % ranks:
        return math.inf
    variance = (1 - 1 / ranks) * ranks * (1 / _PAIRS + _UNEVENNESS**2 / experts)
    return 1 + math.sqrt(2 * math.log(ranks) * variance)


def divide(inner: int, ranks: int) -> list[int]:
    """Returns how many of an expert's inner numbers each rank has: whole tiles, if there is one for each."""
    grain = _TILE if inner >= _TILE * ranks else 1
    tiles, rest = divmod(inner, grain)
    parts = [(tiles // ranks + (rank < tiles % ranks)) * grain for rank in range(ranks)]
    parts[-1] += rest
    return parts


def find_largest_share(experts: int, inner: int, ranks: int) -> float:
    """Returns the largest part of a layer's experts that a rank holds."""
    if choose_way(experts, inner, ranks) == "spread":
        return 1 / ranks
    return max(divide(inner, ranks)) / inner


def is_experts(module: nn.Module) -> bool:
    """Returns whether a module is the experts of a layer, with a tensor for all of them, as Transformers makes it."""
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate")


def keep_routers_whole(model: nn.Module) -> None:
    """Keeps AutoTP from splitting what chooses the experts: each rank chooses by itself, and for all of them."""
    for block in model.modules():
        if not any(is_experts(child) for child in block.children()):
            continue
        for name, child in block.named_children():
            if "gate" in name or "router" in name:
                # Warning: a private word of DeepSpeed 0.19.8, which leaves a module that has it as it is. A version
                # that forgets it splits routers that are linear layers (PhiMoE, Hunyuan), which fails by its shapes.
                child._is_autoep_layer = True  # type: ignore[assignment]


def split_experts(model: nn.Module, group: dist.ProcessGroup, way: Way | None = None) -> None:
    """Replaces the experts of each layer, in place, by this rank's share; weights stay views of what they were.

    Args:
        way: how they are shared out; None: as `choose_way` says.
    """
    for block in list(model.modules()):
        for name, child in list(block.named_children()):
            if is_experts(child):
                setattr(block, name, _take_share(child, group, way))


def _take_share(module: Any, group: dist.ProcessGroup, way: Way | None) -> ExpertsOfRank:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    count = len(module.down_proj)
    inner = module.down_proj.shape[1 if module.is_transposed else 2]
    if (way or choose_way(count, inner, ranks)) == "split":
        parts = divide(inner, ranks)
        _keep_part(module, (sum(parts[:rank]), parts[rank]), inner, has_bias=rank == 0)
        return ExpertsOfRank(module, group, None)
    share = count // ranks
    for name, parameter in list(module.named_parameters(recurse=False)):
        pieces = Pieces.of(parameter, 0)
        _put(module, name, Pieces(pieces.experts[rank * share : (rank + 1) * share], 0))
    module.num_experts = share
    module._is_expert_parallel = True  # Transformers' own functions look at it: index `share` is no expert
    return ExpertsOfRank(module, group, rank * share)


def _keep_part(module: Any, part: tuple[int, int], inner: int, *, has_bias: bool) -> None:
    """Leaves a span of the inner numbers of each expert.

    Args:
        part: the first and how many.
        inner: how many there are.
        has_bias: this rank adds the biases of the outputs, which are added once.
    """
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    columns, depth = (1, 0) if module.is_transposed else (0, 1)
    spans = _find_spans(module, part, inner)
    _put(module, up_name, Pieces.of(getattr(module, up_name), columns).cut(spans))
    _put(module, "down_proj", Pieces.of(module.down_proj, depth).cut([part]))
    if module.has_bias:
        _put(module, f"{up_name}_bias", Pieces.of(getattr(module, f"{up_name}_bias"), 0).cut(spans))
        if not has_bias:
            module.down_proj_bias = nn.Parameter(torch.zeros_like(module.down_proj_bias), requires_grad=False)


def _find_spans(module: Any, part: tuple[int, int], inner: int) -> Sequence[tuple[int, int]]:
    """Returns which columns of the first product make `part` of the inner numbers."""
    first, length = part
    if not module.has_gate:
        return [part]
    if module.is_concatenated:  # all gates, then all that is gated
        return [part, (inner + first, length)]
    return [(2 * first, 2 * length)]  # by turns


def _put(module: nn.Module, name: str, pieces: Pieces) -> None:
    setattr(module, name, pieces.make_placeholder())


class ExpertsOfRank(nn.Module):
    """A rank's share of the experts of a layer; the output is the sum over the ranks.

    Args:
        share: the family's own module, with weights of the share alone.
        first: the number of its first expert; None: it has a part of every expert.
    """

    def __init__(self, share: Any, group: dist.ProcessGroup, first: int | None) -> None:
        super().__init__()
        self.share, self._first, self._group = share, first, register_group(group)

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """As `Experts` of Transformers: [tokens, width], and the experts and weights of each, [tokens, K]."""
        if self._first is not None:
            count = self.share.num_experts
            own = top_k_index - self._first
            others = (own < 0) | (own >= count)
            # Transformers' functions want both: a number behind the last expert's, and a weight of zero.
            top_k_index, top_k_weights = own.masked_fill(others, count), top_k_weights.masked_fill(others, 0)
        output: torch.Tensor = self.share(hidden, top_k_index, top_k_weights)
        sum_over_ranks(output, self._group)
        return output
