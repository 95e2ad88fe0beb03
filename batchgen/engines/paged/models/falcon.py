"""Falcon, which does not ask Transformers' attention interface: fused projections in three layouts, rotary or ALiBi."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.falcon.modeling_falcon import FalconAttention, FalconModel, apply_rotary_pos_emb

from batchgen.engine import Peers
from batchgen.engines.paged.attention import attend
from batchgen.engines.paged.layout import AttentionShape
from batchgen.engines.paged.models.bloom import compute_slopes

# Warning: `patch` sets `__class__` of modules that Transformers has made; see `bloom`. Our `forward` uses
# word_embeddings, h, ln_f, rotary_emb, query_key_value, inv_norm_factor, head_dim, num_heads, num_kv_heads,
# new_decoder_architecture, multi_query and dense.


def patch(body: Any, layers: Sequence[Any], peers: Peers) -> None:
    """Gives the attention of Falcon to `attend`; each of `peers` has its share of the heads."""
    body.__class__ = _PagedFalconModel
    slopes = None
    if body.config.alibi:
        # Falcon rounds the slopes to bfloat16, and scales scores and biases together.
        slopes = compute_slopes(body.config.num_attention_heads).bfloat16().float()
        slopes = (slopes * layers[0].self_attention.inv_norm_factor).chunk(peers.count)[peers.place].to(body.device)
    for layer in layers:
        layer.self_attention.__class__ = _PagedFalconAttention
        layer.self_attention.slopes = slopes


class _PagedFalconModel(FalconModel):  # type: ignore[no-untyped-call]
    """Falcon without masks and the tensor of position biases, which `attend` does not need."""

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        hidden = self.word_embeddings(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rotary = None if self.use_alibi else self.rotary_emb(hidden, position_ids=position_ids)
        for layer in self.h:
            hidden = layer(hidden, alibi=None, attention_mask=None, position_embeddings=rotary)[0]
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.ln_f(hidden))


class _PagedFalconAttention(FalconAttention):
    """Falcon's attention over its own key heads, which Transformers repeats before it keeps them."""

    layer_number: torch.Tensor
    slopes: torch.Tensor | None

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (part.transpose(1, 2) for part in self._split(self.query_key_value(hidden_states)))
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)  # type: ignore[no-untyped-call]
        context = attend(query, key, value, self.layer_number, AttentionShape(self.inv_norm_factor, slopes=self.slopes))
        return self.dense(context.flatten(2)), None

    def _split(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, [1, tokens, heads, head size] each, of the product that holds them all."""
        if self.new_decoder_architecture:  # for each key head: its query heads, then the key, then the value
            group = self.num_heads // (self.num_kv_heads or 1)
            each = fused.view(*fused.shape[:2], -1, group + 2, self.head_dim)
            return each[..., :-2, :].flatten(2, 3), each[..., -2, :], each[..., -1, :]
        if self.multi_query:  # all query heads, then one key and one value
            each = fused.view(*fused.shape[:2], -1, self.head_dim)
            return each[..., :-2, :], each[..., -2:-1, :], each[..., -1:, :]
        each = fused.view(*fused.shape[:2], -1, 3, self.head_dim)  # for each head: query, key and value
        return each[..., 0, :], each[..., 1, :], each[..., 2, :]
