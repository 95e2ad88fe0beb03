"""A rank's share of a model, from whatever files there are: the model's own, or some that are split by rank."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from batchgen.engine import EngineError, Setup
from batchgen.models import loading, split_folder
from batchgen.tensor_parallel.adapted import find_additions
from batchgen.tensor_parallel.autotp import split
from batchgen.tensor_parallel.group import Group
from batchgen.tensor_parallel.split_files import read_split
from batchgen.tensor_parallel.weights import copy_weights, map_model

logger = logging.getLogger(__name__)


def load_shard(setup: Setup, config: Any, group: Group, attn_implementation: str | None = None) -> Any:
    """Loads this rank's share of the model onto its device.

    Raises:
        EngineError: the model has no such share, or the files are split in another way.
    """
    begin, device = time.perf_counter(), group.device
    eight_bits = setup.dtype == "int8"
    layout = split_folder.read(Path(setup.model))
    as_split = layout is not None and setup.dtype == "auto" and layout.dtype in loading.FLOATING
    dtype = _choose_dtype(layout.dtype if layout is not None and as_split else setup.dtype, config, device)
    if layout is not None:
        _check_presplit(layout, setup, len(group.ranks), dtype)
        model = read_split(Path(setup.model), layout, group.model, device, attn_implementation)
    else:
        loading.check_weights(setup.model)
        model = map_model(setup.model, attn_implementation, setup.adapter)
        if len(group.ranks) > 1:
            split(model, group.model)
    if layout is None or (eight_bits and layout.dtype != "int8"):
        additions = find_additions(setup.adapter, setup.model, config, group)
        copy_weights(model, setup.model, device, dtype, eight_bits=eight_bits, additions=additions)
    if setup.world.rank == 0:
        size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        logger.info(
            "loaded in %.1f s: %.2f GB of weights on each of %d ranks, %d of which share a model",
            time.perf_counter() - begin,
            size / 1e9,
            setup.world.size,
            len(group.ranks),
        )
    return model


def _choose_dtype(dtype: str, config: Any, device: torch.device) -> torch.dtype:
    """Returns the type to compute with; with 8 bits the model's own, but never float32 on a GPU, where it is slow."""
    if dtype != "int8":
        return loading.floating_dtype(dtype, config)
    own = loading.own_dtype(config)
    return torch.bfloat16 if own == torch.float32 and device.type == "cuda" else own


def _check_presplit(layout: split_folder.Split, setup: Setup, size: int, dtype: torch.dtype) -> None:
    if layout.ranks != size:
        raise EngineError(
            f"{setup.model} is split over {layout.ranks} ranks, and a group of this run has {size}: give --tp "
            f"{layout.ranks} with a multiple of {layout.ranks} ranks, or the model it was made from, {layout.model}"
        )
    wanted = "int8" if setup.dtype == "int8" else loading.name_of(dtype)
    if layout.dtype != wanted and not (wanted == "int8" and layout.dtype in loading.FLOATING):
        able = f"{layout.dtype} with --engine ds-inference" if layout.dtype == "int8" else layout.dtype
        raise EngineError(
            f"{setup.model} holds weights of type {layout.dtype}, and the run is to have {wanted}: give --dtype "
            f"{able}, or split the model again with --dtype {setup.dtype}"
        )
