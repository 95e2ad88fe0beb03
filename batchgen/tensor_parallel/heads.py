"""What attention has for each head beside its linear layers, and AutoTP leaves whole: each rank keeps its heads' part.

Sinks are a number a head (gpt-oss); norms of queries and keys may have weights for each head (Cohere, StableLM), or
take the mean over all heads at once (OLMo 2 and 3, OLMoE, MiniMax M2), which then is a sum over the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from batchgen.tensor_parallel.operators import register_group, sum_over_ranks

_NORMS = (("q_proj", "q_norm"), ("k_proj", "k_norm"), ("q_proj", "q_layernorm"), ("k_proj", "k_layernorm"))
_ROUND_LAST = ("Olmo2RMSNorm", "Olmo3RMSNorm")  # these multiply by the weight before they round


def split_heads(model: nn.Module, group: dist.ProcessGroup, meta: Any) -> None:
    """Leaves to each rank what belongs to its heads, in place; weights become views.

    To be called before AutoTP, which changes the projections that sizes are compared with.

    Args:
        meta: DeepSpeed's `AutoTPMeta` of the model, by which AutoTP divides the heads.
    """
    for attention in list(model.modules()):
        if isinstance(sinks := getattr(attention, "sinks", None), nn.Parameter) and sinks.dim() == 1:
            sinks.data = sinks.data.narrow(0, *find_span(len(sinks), group, meta))
        for projection_name, name in _NORMS:
            projection, norm = getattr(attention, projection_name, None), getattr(attention, name, None)
            if isinstance(projection, nn.Linear) and isinstance(norm, nn.Module):
                setattr(attention, name, _take_share(norm, projection.out_features, group, meta))


def find_span(total: int, group: dist.ProcessGroup, meta: Any) -> tuple[int, int]:
    """Returns the first of `total` numbers that go by head, and how many of them, this rank has."""
    from deepspeed.module_inject.tp_shard import get_shard_size_list

    rank = dist.get_rank(group)
    parts = get_shard_size_list(total, dist.get_world_size(group), meta, "self_attn")
    return sum(parts[:rank]), parts[rank]


def _take_share(norm: Any, width: int, group: dist.ProcessGroup, meta: Any) -> nn.Module:
    """Returns this rank's norm of queries or keys, which are `width` numbers over all ranks."""
    if isinstance(getattr(norm, "norms", None), nn.ModuleList):  # one for each head
        first, count = find_span(len(norm.norms), group, meta)
        norm.norms = norm.norms[first : first + count]
        return norm  # type: ignore[no-any-return]
    weight = getattr(norm, "weight", None)
    if weight is None:
        return norm  # type: ignore[no-any-return]
    if weight.dim() == 2:  # [heads, size of a head]
        weight.data = weight.data.narrow(0, *find_span(len(weight), group, meta))
    elif len(weight) == width:
        weight.data = weight.data.narrow(0, *find_span(width, group, meta))
        return NormOverRanks(norm, width, group)
    return norm  # type: ignore[no-any-return]


class NormOverRanks(nn.Module):
    """A root mean square norm of vectors of which each rank has a part.

    Args:
        norm: whose weight is this rank's part; its `variance_epsilon` is added to the mean.
        width: the numbers of a vector over all ranks.
    """

    def __init__(self, norm: Any, width: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self._epsilon, self._width = norm.weight, norm.variance_epsilon, width
        self._rounds_last = type(norm).__name__ in _ROUND_LAST
        self._group = register_group(group)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        wide = inputs.to(torch.float32)
        squares = wide.pow(2).sum(-1, keepdim=True)
        sum_over_ranks(squares, self._group)
        normed = wide * torch.rsqrt(squares / self._width + self._epsilon)
        output: torch.Tensor = self.weight * (normed if self._rounds_last else normed.to(inputs.dtype))
        return output.to(inputs.dtype) if self._rounds_last else output
