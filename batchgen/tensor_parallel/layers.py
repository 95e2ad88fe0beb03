"""AutoTP's layers as plain modules: what a rank computes, and what the ranks do together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from batchgen.models.quantised.places import move_quantised
from batchgen.tensor_parallel.fused import FusedLinear, join_parts, make_linear
from batchgen.tensor_parallel.operators import register_group, sum_over_ranks


def use_plain_layers(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Replaces AutoTP's layers, in place, by modules of this file.

    What is left of a layer is a `torch.nn.Linear` of this rank's share, alone where it makes some of the columns.

    Args:
        model: was `split` over `group`, and its weights are on this rank's device.
    """
    from deepspeed.module_inject.layers import TensorParallel_Layer

    register_group(group)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TensorParallel_Layer):
                setattr(module, name, _make_plain(child, group))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FusedLinear):
                setattr(module, name, join_parts(child))


def _make_plain(layer: Any, group: dist.ProcessGroup) -> nn.Module:
    from deepspeed.module_inject.layers import LinearAllreduce, VocabParallelEmbedding

    if isinstance(layer, VocabParallelEmbedding):
        return VocabularyEmbedding(layer.weight, layer.vocab_start_index, group)
    if isinstance(layer, LinearAllreduce):
        return AllReduceLinear(move_quantised(layer, make_linear(layer.weight, None)), layer.bias, group)
    linear = move_quantised(layer, make_linear(layer.weight, layer.bias))
    return AllGatherLinear(linear, layer._partition_sizes, group) if layer.gather_output else linear


class AllReduceLinear(nn.Module):
    """A linear layer of which each rank has some inputs, and all columns: the output is the sum over the ranks."""

    def __init__(self, share: nn.Linear, bias: nn.Parameter | None, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.share, self.bias, self._group = share, bias, group.group_name

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.share(inputs)
        sum_over_ranks(output, self._group)
        return output if self.bias is None else output + self.bias


class AllGatherLinear(nn.Module):
    """A linear layer of which each rank has some of the columns, and all ranks get all of them.

    Args:
        columns: the number of columns of each rank, in order.
    """

    def __init__(self, share: nn.Linear, columns: Sequence[int], group: dist.ProcessGroup) -> None:
        super().__init__()
        self.share, self._columns, self._group = share, list(columns), group

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        own, width = self.share(inputs), max(self._columns)
        padded = F.pad(own, (0, width - own.shape[-1])).reshape(-1, width)
        gathered = padded.new_empty((len(self._columns) * len(padded), width))
        dist.all_gather_into_tensor(gathered, padded, group=self._group)
        parts = gathered.view(len(self._columns), *own.shape[:-1], width)
        return torch.cat([part[..., :count] for part, count in zip(parts, self._columns, strict=True)], -1)


class VocabularyEmbedding(nn.Module):
    """An embedding of which each rank has the vectors of some words, and zeros for the others: the output is their sum.

    Args:
        weight: this rank's vectors, [words of this rank, hidden size].
        first: the id of the first of these words.
    """

    def __init__(self, weight: nn.Parameter, first: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self._first, self._group = weight, first, group.group_name

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = ids - self._first
        others = (places < 0) | (places >= len(self.weight))
        output = F.embedding(places.masked_fill(others, 0), self.weight).masked_fill(others[..., None], 0.0)
        sum_over_ranks(output, self._group)
        return output


class ScaledEmbedding(nn.Module):
    """An embedding times a number, as Gemma has it.

    Args:
        embedding: of this rank.
        scale: the number, a tensor without dimensions; it is rounded to the embedding's type.
    """

    def __init__(self, embedding: nn.Module, scale: torch.Tensor) -> None:
        super().__init__()
        self.embedding = embedding
        self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.embedding(ids)
        return output * self.get_buffer("embed_scale").to(output.dtype)
