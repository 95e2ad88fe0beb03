"""Rotary positions of type "longrope" (LongRoPE, Ding et al., 2024), for tokens of many sequences at once.

A model has two sets of frequencies: one for sequences up to the original context, another one for longer ones.
Transformers takes that of the longest sequence of a forward for all of them. Here each token has that of its own: the
second set if its prompt is longer than the original context, or if the token itself lies beyond it. These are the
frequencies that Transformers' `generate` takes for the row alone. Of Phi-3 and its kin, `generate` computes the whole
row anew with the second set where it grows beyond the original context, and so does the scheduler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from batchgen.engines.paged.layout import get_current_layout

TYPE = "longrope"
_RESTRETCHED = frozenset(("phi3", "phi4_multimodal", "phimoe"))


def find_original_context(text: Any) -> int | None:
    """Returns the tokens of the original context of a text config; None: its positions are of another type."""
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != TYPE:
        return None
    given = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    return int(given or text.max_position_embeddings)


def find_restretched_at(text: Any) -> int | None:
    """Returns the tokens from which on `generate` computes a row anew that grows beyond them; None: it never does.

    Source: `prepare_inputs_for_generation` of `Phi3ForCausalLM`, `PhimoeForCausalLM` and `Phi4MultimodalForCausalLM`.
    """
    is_stretched = find_original_context(text) is not None and text.model_type in _RESTRETCHED
    return getattr(text, "original_max_position_embeddings", None) if is_stretched else None


def patch(body: Any) -> None:
    """Replaces the rotary module of a body, if its positions are of this type."""
    original = find_original_context(body.config)
    if original is not None:
        for name, module in list(body.named_children()):
            if getattr(module, "rope_type", None) == TYPE:
                setattr(body, name, _LongRope(module, original))


class _LongRope(nn.Module):
    _short: torch.Tensor
    _long: torch.Tensor

    def __init__(self, rotary: Any, original: int) -> None:
        super().__init__()
        device = rotary.original_inv_freq.device
        longer, _ = ROPE_INIT_FUNCTIONS[TYPE](rotary.config, device, seq_len=original + 1)
        self._original = original
        self._scaling = self._long_scaling = rotary.attention_scaling
        rope = rotary.config.rope_parameters
        if (
            "short_mscale" in rope
        ):  # Phi-MoE, of which Transformers takes the first set for all, and scales each by its own
            longer = rotary.original_inv_freq
            self._scaling, self._long_scaling = rope["short_mscale"], rope["long_mscale"]
        self.register_buffer("_short", rotary.original_inv_freq.float(), persistent=False)
        self.register_buffer("_long", longer.float().to(device), persistent=False)

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and sines of the tokens at `position_ids` [1, tokens]: [1, tokens, rotary size] each."""
        layout = get_current_layout()
        reach = position_ids + 1
        reach = reach.amax(-1, keepdim=True) if layout is None else torch.maximum(reach, layout.prompt_tokens)
        is_long = (reach > self._original)[..., None]
        frequencies = torch.where(is_long, self._long, self._short)
        scaling = self._scaling
        if self._long_scaling != scaling:
            scaling = torch.where(is_long, self._long_scaling, scaling)
        angles = position_ids[..., None].float() * frequencies
        both = torch.cat((angles, angles), -1)
        return (both.cos() * scaling).to(hidden.dtype), (both.sin() * scaling).to(hidden.dtype)
