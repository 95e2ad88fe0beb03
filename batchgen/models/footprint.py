"""Bytes of memory that a row of a batch takes, estimated from the model's config alone."""

from __future__ import annotations

import math
from typing import Any


def cache_bytes_per_token(config: Any, item_bytes: int, ranks: int = 1) -> int:
    """Returns the bytes of one token's keys and values in all layers, on each of the `ranks` that share the heads."""
    heads, head_size = cached_heads(config)
    size: int = config.get_text_config().num_hidden_layers * 2 * math.ceil(heads / ranks) * head_size * item_bytes
    return size


def cached_heads(config: Any) -> tuple[int, int]:
    """Returns how many heads of keys a layer's cache holds, and the size of one; (0, 0) without attention."""
    text = config.get_text_config()
    heads = _find_size(text, "num_attention_heads")
    if not heads:
        return 0, 0
    size = _find_size(text, "head_dim") or text.hidden_size // heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1, size  # as Falcon-7B and StarCoder have it
    cached = _find_size(text, "num_key_value_heads") or _find_size(text, "num_kv_heads")
    return cached or heads, size


def _find_size(text: Any, name: str) -> int | None:
    """Returns a size from the config of a text model; the largest, if it has one for each layer; None: it has none."""
    try:
        given = getattr(text, name, None)
    except RuntimeError:  # so Transformers says that its layers differ
        given = [getattr(text.per_layer_config[layer], name) for layer in range(text.num_hidden_layers)]
    return max(given, default=None) if isinstance(given, (list, tuple)) else given


def bytes_per_row(
    config: Any, *, prompt_tokens: int, new_tokens: int, item_bytes: int, eager: bool, ranks: int = 1
) -> int:
    """Estimates, from the config alone, the bytes that one row of a batch takes on each rank.

    `ranks` of them share the model's heads.

    The cache holds a key and a value a layer and token; that of a state-space model (Mamba) a state a layer, of any
    number of tokens. Logits are float32, twice: as computed and as processed. During prefill one layer's activations
    live at a time: about four of the hidden size and three of the MLP's. `eager` attention writes its scores out, in
    the model's type and in float32.
    """
    text = config.get_text_config()
    heads = math.ceil((_find_size(text, "num_attention_heads") or 0) / ranks)
    cache = cache_bytes_per_token(config, item_bytes, ranks) * (prompt_tokens + new_tokens)
    logits = text.vocab_size * 4 * 2
    inner = math.ceil((_find_size(text, "intermediate_size") or 4 * text.hidden_size) / ranks)
    activations = prompt_tokens * (4 * text.hidden_size + 3 * inner) * item_bytes
    scores = heads * prompt_tokens**2 * (item_bytes + 4) if eager else 0
    kept = (getattr(text, "state_size", None) or 0) + (getattr(text, "conv_kernel", None) or 0)
    states = 0 if heads else text.num_hidden_layers * inner * kept * item_bytes
    return int(cache + logits + activations + scores + states)
