"""A rank's share of a model, from whatever files there are: the model's own, or some that are split by rank."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from batchgen.engine import EngineError, Setup
from batchgen.models import loading, split_folder
from batchgen.models.int8 import Int8Weight
from batchgen.models.quantised.rounding import Scheme
from batchgen.tensor_parallel.adapted import find_additions
from batchgen.tensor_parallel.autotp import split
from batchgen.tensor_parallel.group import Group
from batchgen.tensor_parallel.rounded import Rounding, count_bytes
from batchgen.tensor_parallel.split_files import read_split
from batchgen.tensor_parallel.weights import copy_weights, map_model

logger = logging.getLogger(__name__)


def load_shard(
    setup: Setup, config: Any, group: Group, attn_implementation: str | None = None, scheme: Scheme | None = None
) -> Any:
    """Loads this rank's share of the model onto its device.

    Args:
        scheme: how the weights of layers are rounded, for an engine that has products of such weights; None: with dtype
            int8 they become `Int8Weight`, with others none is rounded.

    Raises:
        EngineError: the model has no such share, or the files are split in another way.
    """
    begin, device = time.perf_counter(), group.device
    rounding: Rounding | None = Int8Weight if scheme is None and setup.dtype == "int8" else scheme
    layout = split_folder.read(Path(setup.model))
    as_split = layout is not None and setup.dtype == "auto" and layout.dtype in loading.FLOATING
    dtype = _choose_dtype(layout.dtype if layout is not None and as_split else setup.dtype, config, device, scheme)
    if layout is not None:
        _check_presplit(layout, setup, len(group.ranks), dtype, scheme)
        model = read_split(Path(setup.model), layout, group.model, device, attn_implementation)
    else:
        loading.check_weights(setup.model)
        model = map_model(setup.model, attn_implementation, setup.adapter)
        if len(group.ranks) > 1:
            split(model, group.model)
    if layout is None or (rounding is not None and layout.dtype != "int8"):
        additions = find_additions(setup.adapter, setup.model, config, group)
        copy_weights(model, setup.model, device, dtype, rounding=rounding, additions=additions)
    if setup.world.rank == 0:
        logger.info(
            "loaded in %.1f s: %.2f GB of weights on each of %d ranks, %d of which share a model",
            time.perf_counter() - begin,
            count_bytes(model) / 1e9,
            setup.world.size,
            len(group.ranks),
        )
    return model


def load_alone(setup: Setup, config: Any, device: torch.device, dtype: torch.dtype, scheme: Scheme | None) -> Any:
    """Loads a whole model onto the device of a rank that has it for itself, weight by weight.

    Args:
        dtype: that it computes in.
        scheme: how the weights of layers are rounded; None: they are as the checkpoint has them, be it quantised.

    Raises:
        EngineError: it cannot be loaded, or no weight of it can be rounded like this.
    """
    begin = time.perf_counter()
    loading.check_weights(setup.model)
    model = map_model(setup.model, None, setup.adapter)
    additions = find_additions(setup.adapter, setup.model, config, None)
    size = copy_weights(model, setup.model, device, dtype, rounding=scheme, additions=additions)
    if setup.world.rank == 0:
        logger.info("loaded in %.1f s: %.2f GB of weights on each rank", time.perf_counter() - begin, size / 1e9)
    return model


def choose_compute_dtype(config: Any, device: torch.device) -> torch.dtype:
    """Returns the type in which a model computes whose weights are rounded further: its own, but never float32 on a
    GPU, where that is slow, and float32 on a CPU that is slow in its own."""
    dtype = loading.automatic_dtype(config, on_gpu=device.type == "cuda")
    return torch.bfloat16 if dtype == torch.float32 and device.type == "cuda" else dtype


def _choose_dtype(dtype: str, config: Any, device: torch.device, scheme: Scheme | None) -> torch.dtype:
    """Returns the type to compute with; with `Int8Weight` the model's own, but never float32 on a GPU."""
    if scheme is not None:
        return choose_compute_dtype(config, device)
    if dtype != "int8":
        return loading.floating_dtype(dtype, config)
    own = loading.own_dtype(config)
    return torch.bfloat16 if own == torch.float32 and device.type == "cuda" else own


def _check_presplit(
    layout: split_folder.Split, setup: Setup, size: int, dtype: torch.dtype, scheme: Scheme | None
) -> None:
    if layout.ranks != size:
        raise EngineError(
            f"{setup.model} is split over {layout.ranks} ranks, and a group of this run has {size}: give --tp "
            f"{layout.ranks} with a multiple of {layout.ranks} ranks, or the model it was made from, {layout.model}"
        )
    rounds = setup.dtype == "int8" or scheme is not None
    wanted = setup.dtype if rounds else loading.name_of(dtype)
    takes = layout.dtype in loading.FLOATING if rounds else layout.dtype == wanted
    if not takes and not (layout.dtype == "int8" and setup.dtype == "int8" and scheme is None):
        able = f"{layout.dtype} with --engine ds-inference" if layout.dtype == "int8" else layout.dtype
        raise EngineError(
            f"{setup.model} holds weights of type {layout.dtype}, and the run is to have {wanted}: give --dtype "
            f"{able}, or split the model again with --dtype {'auto' if scheme is not None else setup.dtype}"
        )
