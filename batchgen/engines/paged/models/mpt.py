"""MPT, which does not ask Transformers' attention interface: ALiBi, and projections that may be clipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.mpt.modeling_mpt import MptAttention, MptModel

from batchgen.engine import Peers
from batchgen.engines.paged.attention import attend
from batchgen.engines.paged.layout import AttentionShape

# Warning: `patch` sets `__class__` of modules that Transformers has made; see `bloom`. Our `forward` uses wte, blocks,
# norm_f, Wqkv, clip_qkv, n_heads, head_dim, softmax_scale and out_proj.


def patch(body: Any, layers: Sequence[Any], peers: Peers) -> None:
    """Gives the attention of MPT to `attend`; each of `peers` has its share of the heads."""
    body.__class__ = _PagedMptModel
    slopes = compute_slopes(body.config.n_heads)
    for layer in layers:
        layer.attn.__class__ = _PagedMptAttention
        layer.attn.slopes = slopes.chunk(peers.count)[peers.place].to(body.device)


def compute_slopes(heads: int) -> torch.Tensor:
    """The slopes of MPT, [heads]: 2^(-8 * k / n) for k from 1 to n, the power of two at or above `heads`; if that
    is not `heads` itself, every second one first, and then the others, as many as there are heads.

    Source: `MptModel` of Transformers, which takes 8 whatever `alibi_bias_max` says. Other than in the article they
    fall by head in another order.
    """
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** (-8 * (place + 1) / power) for place in range(power)]
    if power != heads:
        slopes = [*slopes[1::2], *slopes[::2]][:heads]
    return torch.tensor(slopes)


class _PagedMptModel(MptModel):  # type: ignore[no-untyped-call]
    """MPT without the tensor of position biases and the mask, which `attend` does not need."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        hidden = self.wte(input_ids)
        for block in self.blocks:
            hidden = block(hidden, position_bias=None, attention_mask=None)[0]
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.norm_f(hidden))


class _PagedMptAttention(MptAttention):
    """MPT's attention, whose biases are worked out where the scores are."""

    layer_number: torch.Tensor
    slopes: torch.Tensor

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        parts = (part.view(*part.shape[:2], -1, self.head_dim).transpose(1, 2) for part in mixed.chunk(3, -1))
        query, key, value = parts
        context = attend(
            query, key, value, self.layer_number, AttentionShape(float(self.softmax_scale or 0), slopes=self.slopes)
        )
        return self.out_proj(context.flatten(2)), None
