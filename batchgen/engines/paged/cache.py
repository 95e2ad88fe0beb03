"""The memory of the KV cache: for each layer keys and values, in pages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from batchgen.engines.paged.layer_groups import ONE_GROUP, LayerGroups
from batchgen.engines.paged.layout import LayerCache
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.models import footprint


def make_caches(
    config: Any,
    pages: int,
    ranks: int,
    dtype: torch.dtype,
    device: torch.device,
    groups: LayerGroups = ONE_GROUP,
) -> list[LayerCache]:
    """Makes the cache of each layer, which holds zeros.

    Args:
        config: of the whole model.
        pages: how many the cache has for tokens in all layers; there are as many for each group.
        ranks: that hold the model together; each has as many key heads as the others.
        groups: of the layers. Layers of different groups may have the same cache, and different pages of it.
    """
    caches = []
    layers = footprint.list_layer_caches(config)
    for layer in layers[: groups.caches or len(layers)]:  # if there are several groups, all layers are alike
        shape = (pages * groups.count, layer.heads // ranks, PAGE_SIZE)
        sizes = (layer.key_size, layer.value_size)
        caches.append(LayerCache(*(_make_zeros((*shape, size), dtype, device) for size in sizes)))
    return [caches[place.cache] for place in groups.places] or caches


def count_token_bytes(config: Any, ranks: int, item_bytes: int, groups: LayerGroups) -> int:
    """Returns the bytes that the cache of a rank has for a token in all layers, those that groups leave empty
    included; arguments as those of `make_caches`."""
    layers = footprint.list_layer_caches(config)[: groups.caches]
    return groups.count * item_bytes * sum(layer.heads // ranks * layer.head_size for layer in layers)


def _make_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take memory of the host where they are written: `torch.zeros` writes them all, 12 GB in 14 seconds."""
    if device.type == "cuda":
        return torch.zeros(shape, dtype=dtype, device=device)
    whole = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)  # the operating system's pages, zero until then
    return torch.from_numpy(whole).view(dtype).view(shape).to(device)
