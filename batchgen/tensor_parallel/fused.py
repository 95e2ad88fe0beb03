"""Projections that are fused in one layer: a rank's share of it is its share of each, one below the other.

AutoTP cuts such a layer by its own idea of how it is laid out, and copies all of it into host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from batchgen.models.quantised.places import get_quantised, make_zeros, set_quantised
from batchgen.models.quantised.weight import QuantisedWeight, join_rows
from batchgen.tensor_parallel.heads import find_span


class FusedLinear(nn.Module):
    """A rank's share of several projections of the same input; the output is theirs side by side.

    Args:
        parts: AutoTP's `LinearLayer` of each projection.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(inputs) for part in self.parts], -1)


class _ConfigOfRank:
    """A model's config, with this rank's number of heads: Phi-3's attention takes its fused output apart by it."""

    def __init__(self, config: Any, heads: int) -> None:
        self._config, self.num_attention_heads = config, heads

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # not there yet, as while it is copied
            raise AttributeError(name)
        return getattr(self._config, name)


def split_fused(model: Any, group: dist.ProcessGroup, meta: Any) -> None:
    """Replaces `qkv_proj` and `gate_up_proj` of a model, in place, where they are linear layers; weights become views.

    Args:
        meta: DeepSpeed's `AutoTPMeta` of the model, by which AutoTP divides the heads.
    """
    text = model.config.get_text_config()
    for module in list(model.modules()):
        if isinstance(layer := getattr(module, "gate_up_proj", None), nn.Linear):
            half = layer.out_features // 2
            module.gate_up_proj = _split(layer, {"mlp.gate_proj": half, "mlp.up_proj": half}, group, meta)
        # CodeGen's is laid out in another way, which AutoTP knows.
        key_heads = getattr(text, "num_key_value_heads", None)
        if key_heads and isinstance(layer := getattr(module, "qkv_proj", None), nn.Linear):
            keys = key_heads * module.head_dim
            sizes = {"self_attn.q_proj": layer.out_features - 2 * keys}
            sizes |= {"self_attn.k_proj": keys, "self_attn.v_proj": keys}
            module.qkv_proj = _split(layer, sizes, group, meta)
            module.config = _ConfigOfRank(module.config, find_span(text.num_attention_heads, group, meta)[1])


def _split(layer: nn.Linear, sizes: dict[str, int], group: dist.ProcessGroup, meta: Any) -> FusedLinear:
    """Returns this rank's share of a layer.

    Args:
        sizes: the columns of each projection, by the name that AutoTP divides them by, in order.
    """
    from deepspeed.module_inject.layers import LinearLayer

    parts, first = [], 0
    for name, size in sizes.items():
        bias = None if layer.bias is None else nn.Parameter(layer.bias.data[first : first + size], requires_grad=False)
        weight = nn.Parameter(layer.weight.data[first : first + size], requires_grad=False)
        parts.append(LinearLayer(make_linear(weight, bias), group, name=name, tp_meta=meta))
        first += size
    return FusedLinear(parts)


def join_parts(fused: FusedLinear) -> nn.Linear:
    """Returns one linear layer with the columns of all parts, which are plain ones by now."""
    layers = [part for part in fused.parts if isinstance(part, nn.Linear)]
    biases = [layer.bias.data for layer in layers if layer.bias is not None]
    bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    quantised = [form for layer in layers if (form := get_quantised(layer)) is not None]
    if quantised:
        return _make_quantised(quantised, layers[0].weight, bias)
    weight = nn.Parameter(torch.cat([layer.weight.data for layer in layers]), requires_grad=False)
    return make_linear(weight, bias)


def _make_quantised(parts: Sequence[QuantisedWeight], like: torch.Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """Returns one linear layer of parts of a quantised weight; it computes in the type of `like`."""
    joined = join_rows(parts)
    assert joined is not None, "parts of one weight differ in rows alone"
    zeros = nn.Parameter(make_zeros(joined.shape, like.dtype, like.device), requires_grad=False)
    linear = make_linear(zeros, bias)
    set_quantised(linear, "weight", joined)
    return linear


def make_linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """Returns a linear layer of these parameters, which takes no memory for any of its own."""
    columns, depth = weight.shape
    layer = nn.Linear(depth, columns, bias=False, device="meta")
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]  # one without a bias has None there
    return layer
