"""Bytes of memory that a row of a batch takes, estimated from the model's config alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Words of `layer_types` for layers that keep no keys and values: a state of fixed size, or nothing at all.
_WITHOUT_KEYS = frozenset({"linear_attention", "conv", "mamba", "recurrent", "moe", "mlp", "dummy"})


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """How the numbers of the KV cache are kept. Sizes in bytes."""

    number_bytes: int
    scale_bytes: int = 0  # of the scale that the numbers of a key, or of a value, of one head and token share


AUTO = "auto"
KV_DTYPES = (AUTO, "fp8")
"""The types of numbers that `--kv-dtype` takes; auto is the type that is computed in."""


def find_cache_format(kv_dtype: str) -> CacheFormat | None:
    """Returns how the KV cache is kept with this `--kv-dtype`; None: in the type that is computed in.

    A scale of `fp8` is the exponent of a power of two (`batchgen.engines.paged.rounding`).
    """
    return CacheFormat(number_bytes=1, scale_bytes=1) if kv_dtype == "fp8" else None


@dataclass(frozen=True, slots=True)
class LayerCacheShape:
    """What one layer keeps of each token in the KV cache. A layer that keeps nothing has no heads."""

    heads: int  # of keys, and as many of values
    key_size: int  # elements of a head
    value_size: int
    window: int = 0  # a token sees no further back, so that older ones can be dropped; 0: it sees all

    @property
    def head_size(self) -> int:
        """The elements of one token in one head: its key and its value."""
        return self.key_size + self.value_size

    def head_bytes(self, kept: CacheFormat) -> int:
        """Returns the bytes of one token in one head: its key and its value."""
        return kept.number_bytes * self.head_size + 2 * kept.scale_bytes

    def count_tokens(self, tokens: int, page_size: int = 1) -> int:
        """Returns of how many tokens of a sequence of `tokens` the layer keeps keys and values.

        Args:
            page_size: memory is given out for this many tokens at once. A window that begins anywhere in a page touches
                one page more than it fills.
        """
        pages = -(-tokens // page_size)
        if self.window:
            pages = min(pages, -(-(self.window - 1) // page_size) + 1)
        return pages * page_size


def list_layer_caches(config: Any) -> list[LayerCacheShape]:
    """Returns what each layer of the model with this Transformers config keeps in the KV cache, the first layer first.

    Latent attention (DeepSeek V2 and V3) counts expanded, as attention computes with it: as many heads of keys as of
    queries, with `qk_nope_head_dim` + `qk_rope_head_dim` elements in a key and `v_head_dim` in a value. The static
    cache of Transformers 5.23 keeps the latent form, which is much smaller, and expands it in each step.

    A layer has a window if `layer_types` says so, or if the config has no `layer_types` and a `sliding_window`
    (Mistral, StarCoder2, Phi-3); a config that names a window which its layers do not use (Qwen2) has `layer_types`.
    Layers that reuse another layer's keys (Gemma 3n and 4) keep none.
    """
    text = config.get_text_config()
    count = _find_size(text, "num_hidden_layers") or 0
    each = _list_configs(text, count)
    types = list(getattr(text, "layer_types", None) or [None] * count)
    reused = list(getattr(text, "kv_sharing_modes", None) or [None] * count)
    return [
        _LAYER_WITHOUT_KEYS if how == "reuse" else _find_layer_cache(layer, kind)
        for layer, kind, how in zip(each, types, reused, strict=False)
    ]


_LAYER_WITHOUT_KEYS = LayerCacheShape(0, 0, 0)


def _list_configs(text: Any, count: int) -> Sequence[Any]:
    """Returns a config for each layer: the same one, unless the layers differ in sizes."""
    own = getattr(text, "per_layer_config", None)
    return own if own is not None else [text] * count


def _find_layer_cache(layer: Any, kind: str | None) -> LayerCacheShape:
    """Returns what a layer keeps, by its config and its word in `layer_types`; None: the config has no such list."""
    heads = _find_size(layer, "num_attention_heads")
    if not heads or kind in _WITHOUT_KEYS:
        return _LAYER_WITHOUT_KEYS
    if kind is None:
        window = _find_size(layer, "sliding_window") or _find_size(layer, "attention_chunk_size")
    elif "sliding" in kind:
        window = _find_size(layer, "sliding_window")
    else:
        window = _find_size(layer, "attention_chunk_size") if "chunked" in kind else None
    if _find_size(layer, "kv_lora_rank") and _find_size(layer, "v_head_dim"):
        key = (_find_size(layer, "qk_nope_head_dim") or 0) + (_find_size(layer, "qk_rope_head_dim") or 0)
        return LayerCacheShape(heads, key, layer.v_head_dim, window or 0)
    size = _find_size(layer, "head_dim") or layer.hidden_size // heads
    if getattr(layer, "multi_query", False) and not getattr(layer, "new_decoder_architecture", False):
        cached = 1  # as Falcon-7B and StarCoder have it
    else:
        cached = _find_size(layer, "num_key_value_heads") or _find_size(layer, "num_kv_heads") or heads
        if window and getattr(layer, "model_type", None) == "mimo_v2_flash":
            cached *= 2  # its layers with a window have twice the heads, which stands in the code alone
    return LayerCacheShape(cached, size, _find_size(layer, "v_head_dim") or size, window or 0)


def _find_size(text: Any, name: str) -> int | None:
    """Returns a size from the config of a text model; the largest, if it has one for each layer; None: it has none."""
    try:
        given = getattr(text, name, None)
    except RuntimeError:  # so Transformers says that its layers differ
        given = [getattr(layer, name) for layer in text.per_layer_config]
    return max(given, default=None) if isinstance(given, (list, tuple)) else given


def cached_heads(config: Any) -> tuple[int, int]:
    """Returns how many heads of keys a layer's cache holds, and the elements of one; (0, 0) without attention.

    Where layers differ, or keys and values, these are the largest: `list_layer_caches` has each.
    """
    layers = list_layer_caches(config)
    heads = max((layer.heads for layer in layers), default=0)
    return heads, max((max(layer.key_size, layer.value_size) for layer in layers), default=0)


def cache_bytes_per_token(config: Any, kept: CacheFormat, ranks: int = 1) -> int:
    """Returns the bytes of one token's keys and values in all layers, on each of the `ranks` that share the heads.

    Layers with a window count like the others: it is what a token takes that all layers keep.
    """
    return cache_bytes(config, kept, 1, ranks)


def cache_bytes(config: Any, kept: CacheFormat, tokens: int, ranks: int = 1, page_size: int = 1) -> int:
    """Returns the bytes of the KV cache of a sequence of `tokens` tokens, on each of the `ranks` that share the heads.

    A layer with a window keeps no more tokens than its window, rounded up to whole pages as
    `LayerCacheShape.count_tokens` says.
    """
    return _sum_cache(Counter(list_layer_caches(config)), kept, tokens, ranks, page_size)


def _sum_cache(
    layers: Mapping[LayerCacheShape, int], kept: CacheFormat, tokens: int, ranks: int = 1, page_size: int = 1
) -> int:
    """Returns the same as `cache_bytes`; `layers` says how many there are of each kind."""
    return sum(
        count * layer.count_tokens(tokens, page_size) * math.ceil(layer.heads / ranks) * layer.head_bytes(kept)
        for layer, count in layers.items()
    )


@dataclass(frozen=True, slots=True)
class Execution:
    """How a model is run, as far as the memory of its rows depends on it."""

    item_bytes: int  # of a number of the model's type
    ranks: int = 1  # that share the model's heads
    eager: bool = False  # attention writes its scores out
    drops_past_windows: bool = True  # a layer with a window keeps no older tokens, as Transformers' caches do
    page_size: int = 1  # tokens that the cache gives out memory for at once; a window may touch a page more
    # Each row of a decode step has a copy of the weights of its experts, as `generate` makes it on a GPU: Transformers
    # calls that `batched_mm` (integrations/moe.py).
    copies_experts: bool = False
    cache: CacheFormat | None = None  # None: numbers of the model's type

    @property
    def kept(self) -> CacheFormat:
        """How the numbers of the cache are kept."""
        return self.cache or CacheFormat(self.item_bytes)


@dataclass(frozen=True, slots=True)
class Footprint:
    """The sizes of a model that decide how much memory a row takes. Elements, where nothing else is said."""

    caches: Mapping[LayerCacheShape, int]  # how many layers of each kind there are
    vocabulary: int  # words
    hidden: int
    inner: int  # of a token between the matrices of the widest MLP, or of all of a token's experts together
    experts: int  # of the weights of one token's experts in one layer; 0: the model is no mixture
    heads: int  # of queries
    states: int  # of all layers, of a model without attention

    @classmethod
    def of(cls, config: Any) -> Footprint:
        """Returns the footprint of the model with this Transformers config."""
        text = config.get_text_config()
        heads = _find_size(text, "num_attention_heads") or 0
        inner = _find_size(text, "intermediate_size") or 4 * text.hidden_size
        chosen = find_experts_per_token(config)
        of_expert = _find_size(text, "moe_intermediate_size") or inner
        kept = (getattr(text, "state_size", None) or 0) + (getattr(text, "conv_kernel", None) or 0)
        return cls(
            caches=Counter(list_layer_caches(config)),
            vocabulary=text.vocab_size,
            hidden=text.hidden_size,
            inner=max(inner, chosen * of_expert),
            experts=3 * chosen * of_expert * text.hidden_size,
            heads=heads,
            states=0 if heads else text.num_hidden_layers * inner * kept,
        )

    def row_bytes(self, prompt_tokens: int, new_tokens: int, execution: Execution) -> int:
        """Estimates the bytes that one row of a batch takes on each rank.

        The cache holds a key and a value a layer and token; that of a state-space model (Mamba) a state a layer, of any
        number of tokens. Logits are float32, twice: as computed and as processed. During prefill one layer's
        activations live at a time: about four of the hidden size and three of the MLP's. `eager` attention writes its
        scores out, in the model's type and in float32. Copies of experts are there in a decode step, of one layer.
        """
        size, ranks = execution.item_bytes, execution.ranks
        cache = self.cache_bytes(prompt_tokens + new_tokens, execution)
        logits = self.vocabulary * 4 * 2
        inner = math.ceil(self.inner / ranks)
        activations = prompt_tokens * (4 * self.hidden + 3 * inner) * size
        heads = math.ceil(self.heads / ranks)
        scores = heads * prompt_tokens**2 * (size + 4) if execution.eager else 0
        copies = math.ceil(self.experts / ranks) * size if execution.copies_experts else 0
        return cache + logits + max(activations, copies) + scores + self.states * size

    def cache_bytes(self, tokens: int, execution: Execution) -> int:
        """Returns the bytes of the KV cache of a sequence of `tokens` tokens, on each rank."""
        if execution.drops_past_windows and execution.page_size == 1:
            return _sum_cache(self.caches, execution.kept, tokens, execution.ranks)
        if execution.drops_past_windows and self._can_share_pages:
            # A page that is not full counts by its tokens, so that windows alone make a difference.
            return sum(
                _sum_cache({layer: count}, execution.kept, 1, execution.ranks)
                * min(tokens, layer.count_tokens(tokens, execution.page_size))
                for layer, count in self.caches.items()
            )
        return tokens * _sum_cache(self.caches, execution.kept, 1, execution.ranks)

    @property
    def _can_share_pages(self) -> bool:
        """Whether all layers keep as much of a token, and their windows are equal, so that pages which one has passed
        can be given to any other."""
        sizes = {(layer.heads, layer.key_size, layer.value_size) for layer in self.caches}
        return len(sizes) == 1 and len({layer.window for layer in self.caches} - {0}) <= 1


def find_experts_per_token(config: Any) -> int:
    """Returns how many experts of a layer each token is sent to; 0: the model is no mixture of experts."""
    text = config.get_text_config()
    chosen = (_find_size(text, name) for name in ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"))
    # A family may have dense models, too, whose configs say how many of no experts are chosen.
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    there = max((_find_size(text, name) or 0 for name in names), default=0)
    return min(there, next((size for size in chosen if size), 0))
