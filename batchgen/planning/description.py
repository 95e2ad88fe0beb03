"""What a model's size is, in words: parameters, and the KV cache by kind of layer."""

from __future__ import annotations

from collections import Counter
from typing import Any

from batchgen.models.footprint import CacheFormat, Footprint
from batchgen.models.parameters import Parameters


def describe_model(weights: Parameters, footprint: Footprint, cache: CacheFormat | None = None) -> str:
    """Returns how many parameters a model has, how many of them one token uses, and the KV cache of a token.

    Args:
        cache: how it is kept; None: in the type of the weights.
    """
    parameters = f"{_count(weights.total)} parameters"
    if weights.experts:
        parameters += f", of which {_count(weights.active)} are active for a token"
    return f"{parameters}; {_describe_cache(footprint, cache or CacheFormat(weights.dtype.itemsize))}"


def list_cache_kinds(footprint: Footprint, kept: CacheFormat) -> list[dict[str, Any]]:
    """Returns for each window how many layers have it, and the bytes of one token's keys and values in all of these.

    The window is None in layers that keep all tokens. Layers that keep none are not listed.
    """
    layers, sizes = Counter[int](), Counter[int]()
    for layer, count in footprint.caches.items():
        if layer.heads:
            layers[layer.window] += count
            sizes[layer.window] += count * layer.heads * layer.head_bytes(kept)
    return [{"window": window or None, "layers": layers[window], "bytes_per_token": sizes[window]} for window in layers]


def _describe_cache(footprint: Footprint, kept: CacheFormat) -> str:
    kinds = list_cache_kinds(footprint, kept)
    if not kinds:
        return "no KV cache"
    total = sum(kind["bytes_per_token"] for kind in kinds)
    layers = sum(kind["layers"] for kind in kinds)
    text = f"{total:,} bytes of KV cache for a token in {layers} layers"
    windows = [kind for kind in kinds if kind["window"]]
    if windows:
        text += ", of which " + " and ".join(
            f"{kind['layers']} ({kind['bytes_per_token']:,} bytes) need the last {kind['window']:,} tokens alone"
            for kind in windows
        )
    return text


def _count(elements: int) -> str:
    """Returns a number of parameters in billions, or in millions if they are fewer."""
    return f"{elements / 1e9:.1f} B" if elements >= 1e9 else f"{elements / 1e6:.3g} M"
