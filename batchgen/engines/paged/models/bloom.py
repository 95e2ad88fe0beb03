"""BLOOM, which does not ask Transformers' attention interface: its biases of positions (ALiBi) are made in `attend`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomModel

from batchgen.engine import Peers
from batchgen.engines.paged.attention import attend
from batchgen.engines.paged.layout import AttentionShape

# Warning: `patch` sets `__class__` of modules that Transformers has made.
#
# Why: BLOOM's attention adds a tensor of biases, [heads, 1, keys] of one row, to its scores, and knows no pages.
#
# What breaks: our `forward` uses attributes of theirs (word_embeddings_layernorm, query_key_value, inv_norm_factor,
# _reshape, dense). A version of Transformers that renames one raises AttributeError; one that changes what they mean
# gives wrong text, which the check at load finds. `mlp.gelu_impl` is replaced by torch's GELU, which rounds once.


def patch(body: Any, layers: Sequence[Any], peers: Peers) -> None:
    """Gives the attention of BLOOM to `attend`; each of `peers` has its share of the heads."""
    body.__class__ = _PagedBloomModel
    slopes = compute_slopes(body.config.num_attention_heads).chunk(peers.count)[peers.place]
    for layer in layers:
        layer.self_attention.__class__ = _PagedBloomAttention
        layer.self_attention.slopes = slopes.to(body.device)
        # The same function; theirs comes with a backward pass, and rounds after each of its eight operations.
        layer.mlp.gelu_impl = torch.nn.GELU(approximate="tanh")


def compute_slopes(heads: int) -> torch.Tensor:
    """The slopes of "Train Short, Test Long" (Press et al., 2022), [heads]: a geometric sequence from 2^(-8/n) down by
    the same factor for n a power of two; for other counts, every second one of the next longer sequence follows."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (place + 1) / power) for place in range(power)]
    slopes += [2 ** (-4 * (2 * place + 1) / power) for place in range(heads - power)]
    return torch.tensor(slopes)


class _PagedBloomModel(BloomModel):  # type: ignore[no-untyped-call]
    """BLOOM without the tensor of position biases, which `attend` does not need."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        hidden = self.word_embeddings_layernorm(self.word_embeddings(input_ids))
        for layer in self.h:
            hidden = layer(hidden, alibi=None, attention_mask=None)[0]
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.ln_f(hidden))


class _PagedBloomAttention(BloomAttention):
    """BLOOM's attention, whose biases are worked out where the scores are."""

    layer_number: torch.Tensor
    slopes: torch.Tensor

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, residual: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        context = attend(query, key, value, self.layer_number, AttentionShape(self.inv_norm_factor, slopes=self.slopes))
        return residual + self.dense(context.flatten(2)), None
