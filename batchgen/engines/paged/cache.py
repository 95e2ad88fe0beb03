"""The memory of the KV cache: for each layer keys and values, in pages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from batchgen.engine import EngineError
from batchgen.engines.paged.layer_groups import ONE_GROUP, LayerGroups
from batchgen.engines.paged.layout import LayerCache
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.rounding import NUMBERS
from batchgen.models import footprint
from batchgen.models.footprint import CacheFormat

_FIRST_WITH_8_BITS = (8, 9)  # the compute capability of a GPU


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
        dtype: of keys and values; `rounding.NUMBERS`: they are rounded, and each has a scale.
        groups: of the layers. Layers of different groups may have the same cache, and different pages of it.
    """
    caches = []
    layers = footprint.list_layer_caches(config)
    for layer in layers[: groups.caches or len(layers)]:  # if there are several groups, all layers are alike
        shape = (pages * groups.count, layer.heads // ranks, PAGE_SIZE)
        sizes = (layer.key_size, layer.value_size)
        halves = [_make_zeros((*shape, size), dtype, device) for size in sizes]
        if dtype == NUMBERS:
            halves += [_make_zeros(shape, torch.uint8, device) for _ in sizes]
        caches.append(LayerCache(*halves))
    return [caches[place.cache] for place in groups.places] or caches


def check_device(kv_dtype: str, device: torch.device) -> None:
    """Raises `EngineError` if `device` has no instructions for the numbers of `kv_dtype`."""
    if kv_dtype == footprint.AUTO or device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) >= _FIRST_WITH_8_BITS:
        return
    raise EngineError(
        f"--kv-dtype {kv_dtype}: this GPU ({torch.cuda.get_device_name(device)}) has no 8-bit floats, which came with "
        "compute capability 8.9 (L40S, H100); leave it out"
    )


def find_dtype(kv_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the type of the cache's numbers, of a model that computes in `dtype`."""
    return dtype if kv_dtype == footprint.AUTO else NUMBERS


def find_format(kv_dtype: str, dtype: torch.dtype) -> CacheFormat:
    """Returns how a model that computes in `dtype` keeps its cache."""
    return footprint.find_cache_format(kv_dtype) or CacheFormat(dtype.itemsize)


def count_token_bytes(config: Any, ranks: int, kept: CacheFormat, groups: LayerGroups) -> int:
    """Returns the bytes that the cache of a rank has for a token in all layers, those that groups leave empty
    included.

    Args:
        kept: how its numbers are kept; the others are as those of `make_caches`.
    """
    layers = footprint.list_layer_caches(config)[: groups.caches]
    return groups.count * sum(layer.heads // ranks * layer.head_bytes(kept) for layer in layers)


def _make_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take memory of the host where they are written: `torch.zeros` writes them all, 12 GB in 14 seconds."""
    if device.type == "cuda":
        return torch.zeros(shape, dtype=dtype, device=device)
    whole = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)  # the operating system's pages, zero until then
    return torch.from_numpy(whole).view(dtype).view(shape).to(device)
