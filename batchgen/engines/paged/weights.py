"""The weights of a model that a rank has for itself, and `--dtype fp8`, `int8`, `int4`: weights rounded on the way."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from batchgen import tensor_parallel
from batchgen.engine import EngineError, Setup
from batchgen.engines.paged import models
from batchgen.models import loading, random_weights
from batchgen.models.quantised import find_format, get_settings, has_quantised_weights
from batchgen.models.quantised.rounding import DTYPES, GROUP_SIZES, Scheme

__all__ = ["DTYPES", "check_group_size", "choose_dtype", "finish", "load", "make_scheme"]

_FP8_SINCE = (8, 9)  # compute capability of the first cards that multiply numbers of 8-bit floats


def check_group_size(size: int | None) -> None:
    """Raises EngineError if `--set group_size` is none that there is."""
    if size is not None and size not in GROUP_SIZES:
        sizes = ", ".join(map(str, sorted(GROUP_SIZES)))
        raise EngineError(f"--set group_size={size}: must be one of {sizes}")


def make_scheme(dtype: str, group_size: int | None, config: Any) -> Scheme | None:
    """Returns how the weights are rounded; None: they are not.

    Args:
        config: Transformers' config of the model.

    Raises:
        EngineError: there is no such type; a group size is given, and the type has no groups; or the model is quantised
            already.
    """
    if group_size is not None and dtype != "int4":
        raise EngineError(f"--set group_size={group_size} is of --dtype int4 alone, and this run has {dtype}")
    scheme = Scheme.of(dtype, group_size or 0)
    if scheme is None:
        loading.floating_dtype(dtype, config)  # which refuses what this engine does not have
    elif has_quantised_weights(config):
        method = get_settings(config).get("quant_method")
        raise EngineError(
            f"the weights of this model are quantised already ({method}, by quantization_config in its config.json), "
            f"and are not rounded again: leave --dtype {dtype} out"
        )
    return scheme


def choose_dtype(scheme: Scheme | None, dtype: str, config: Any, device: torch.device) -> torch.dtype:
    """Returns the type that is computed in.

    Raises:
        EngineError: the device cannot compute in it, or with such weights; the message says what to use.
    """
    if scheme is None:
        chosen = loading.floating_dtype(dtype, config)
    else:
        chosen = tensor_parallel.choose_compute_dtype(config, device)
    if device.type == "cuda":
        if scheme is not None and scheme.kind == "fp8" and torch.cuda.get_device_capability(device) < _FP8_SINCE:
            raise EngineError(
                f"--dtype fp8 takes a GPU that multiplies 8-bit floats, as those of 2022 and later do; "
                f"{torch.cuda.get_device_name(device)} does not. Use --dtype int8 or int4"
            )
        models.check_dtype(config, chosen)
    return chosen


def load(
    setup: Setup,
    config: Any,
    device: torch.device,
    scheme: Scheme | None,
    dtype: torch.dtype,
    meanwhile: AbstractContextManager[None],
) -> Any:
    """Loads the whole model onto `device`, with `scheme` its weights rounded one by one; it computes in `dtype`.

    Args:
        meanwhile: entered while weights are read that stay as they are.

    Raises:
        EngineError: it cannot be loaded, or no weight of it can be rounded like this.
    """
    if scheme is None and find_format(config) is None:
        arguments = {"dtype": dtype, "device_map": {"": str(device)}}
        with meanwhile:
            model = loading.load(setup.model, arguments, filled=False, adapter=setup.adapter)
        random_weights.fill_hollow(setup.model, model)  # not before: compilers restore the states of random generators
        return model
    model = tensor_parallel.load_alone(setup, config, device, dtype, scheme)
    finish(model)
    return model


def finish(model: Any) -> None:
    """Makes a loaded model ready to be patched."""
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what was read in 16 bits
