"""AutoTP's layers as plain modules: what a rank computes, and one operator for each thing the ranks do together.

To a compiler such an operator is opaque, and a CUDA graph records it like any other kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

_groups: dict[str, dist.ProcessGroup] = {}  # by name: an operator takes no group


def plain(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Exchanges, in place, the layers of a model that was `split` over `group`, its weights brought.

    What is left of a layer is a `torch.nn.Linear` of this rank's share, alone where it makes some of the columns.
    """
    from deepspeed.module_inject.layers import TensorParallel_Layer

    _groups[group.group_name] = group
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TensorParallel_Layer):
                setattr(module, name, _exchanged(child, group))


def _exchanged(layer: Any, group: dist.ProcessGroup) -> nn.Module:
    from deepspeed.module_inject.layers import LinearAllreduce, VocabParallelEmbedding

    if isinstance(layer, VocabParallelEmbedding):
        return Words(layer.weight, layer.vocab_start_index, group)
    if isinstance(layer, LinearAllreduce):
        return Summed(_linear(layer.weight, None), layer.bias, group)
    made = _linear(layer.weight, layer.bias)
    return Gathered(made, layer._partition_sizes, group) if layer.gather_output else made


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    columns, depth = weight.shape
    layer = nn.Linear(depth, columns, bias=False, device="meta")
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]  # one without a bias has None there
    return layer


class Summed(nn.Module):
    """Each rank has some of the inputs, and all columns: the output is the sum of theirs."""

    def __init__(self, share: nn.Linear, bias: nn.Parameter | None, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.share, self.bias, self._group = share, bias, group.group_name

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.share(inputs)
        torch.ops.batchgen.sum_over_ranks(output, self._group)
        return output if self.bias is None else output + self.bias


class Gathered(nn.Module):
    """Each rank has some of the columns, and all get all of them.

    Args:
        columns: of each rank, in order.
    """

    def __init__(self, share: nn.Linear, columns: Sequence[int], group: dist.ProcessGroup) -> None:
        super().__init__()
        self.share, self._columns, self._group = share, list(columns), group

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        mine, most = self.share(inputs), max(self._columns)
        padded = F.pad(mine, (0, most - mine.shape[-1])).reshape(-1, most)
        every = padded.new_empty((len(self._columns) * len(padded), most))
        dist.all_gather_into_tensor(every, padded, group=self._group)
        parts = every.view(len(self._columns), *mine.shape[:-1], most)
        return torch.cat([part[..., :count] for part, count in zip(parts, self._columns, strict=True)], -1)


class Words(nn.Module):
    """Each rank has the vectors of some of the words; the others add nothing to them."""

    def __init__(self, weight: nn.Parameter, first: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self._first, self._group = weight, first, group.group_name

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = ids - self._first
        others = (places < 0) | (places >= len(self.weight))
        output = F.embedding(places.masked_fill(others, 0), self.weight).masked_fill(others[..., None], 0.0)
        torch.ops.batchgen.sum_over_ranks(output, self._group)
        return output


def _sum(values: torch.Tensor, group: str) -> None:
    dist.all_reduce(values, group=_groups[group])


_library = torch.library.Library("batchgen", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("sum_over_ranks(Tensor(a!) values, str group) -> ()")  # type: ignore[no-untyped-call]
_library.impl("sum_over_ranks", _sum, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("batchgen::sum_over_ranks", lambda values, group: None, lib=_library)
