"""A rank's share of a model, from whatever files there are: the model's own, or some that are split by rank."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from batchgen.engine import EngineError, Setup
from batchgen.models import loading, split_folder
from batchgen.tensor_parallel.autotp import split
from batchgen.tensor_parallel.group import Group
from batchgen.tensor_parallel.split_files import read
from batchgen.tensor_parallel.weights import bring, mapped

logger = logging.getLogger(__name__)


def load(setup: Setup, config: Any, group: Group, attn_implementation: str | None = None) -> Any:
    """This rank's share of the model, on its device.

    Raises:
        EngineError: the model has no such share, or the files are split in another way.
    """
    begun, device = time.perf_counter(), group.device
    eight_bits = setup.dtype == "int8"
    found = split_folder.read(Path(setup.model))
    as_split = found is not None and setup.dtype == "auto" and found.dtype in loading.FLOATING
    dtype = _computed_in(found.dtype if found is not None and as_split else setup.dtype, config, device)
    if found is not None:
        _check_presplit(found, setup, len(group.ranks), dtype)
        model = read(Path(setup.model), found, group.model, device, attn_implementation)
    else:
        loading.check_weights(setup.model)
        model = mapped(setup.model, attn_implementation)
        if len(group.ranks) > 1:
            split(model, group.model)
    if found is None or (eight_bits and found.dtype != "int8"):
        bring(model, setup.model, device, dtype, eight_bits=eight_bits)
    if setup.world.rank == 0:
        size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        logger.info(
            "loaded in %.1f s: %.2f GB of weights on each of %d ranks, %d of which share a model",
            time.perf_counter() - begun,
            size / 1e9,
            setup.world.size,
            len(group.ranks),
        )
    return model


def _computed_in(dtype: str, config: Any, device: torch.device) -> torch.dtype:
    """The type of products; with 8 bits the model's own, but on a GPU never float32, which its units are slow at."""
    if dtype != "int8":
        return loading.floating_dtype(dtype, config)
    own = loading.own_dtype(config)
    return torch.bfloat16 if own == torch.float32 and device.type == "cuda" else own


def _check_presplit(found: split_folder.Split, setup: Setup, size: int, dtype: torch.dtype) -> None:
    if found.ranks != size:
        raise EngineError(
            f"{setup.model} is split over {found.ranks} ranks, and a group of this run has {size}: give --tp "
            f"{found.ranks} with a multiple of {found.ranks} ranks, or the model it was made from, {found.model}"
        )
    wanted = "int8" if setup.dtype == "int8" else loading.name_of(dtype)
    if found.dtype != wanted and not (wanted == "int8" and found.dtype in loading.FLOATING):
        able = f"{found.dtype} with --engine ds-inference" if found.dtype == "int8" else found.dtype
        raise EngineError(
            f"{setup.model} holds weights of type {found.dtype}, and the run is to have {wanted}: give --dtype {able}, "
            f"or split the model again with --dtype {setup.dtype}"
        )
