"""4 and 8 bits a weight under ZeRO, with DeepSpeed's weight quantisation. Lossy: the text will differ.

Each weight of a linear layer or an embedding is stored as whole numbers of 4 or 8 bits with a scale and a minimum for
every `group_size` of its last dimension, and computed with in the run's type. Norms, biases, and experts that a model
keeps in one tensor stay as they are. It cuts what has to be sharded, offloaded and gathered; it makes no step faster
that is not waiting for weights.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import torch

from batchgen.engine import EngineError
from batchgen.models.folder import weight_files
from batchgen.models.parameters import Parameter, Parameters

Bits = Literal[4, 8]

_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names


def make_quantization_section(bits: Bits, group_size: int = 64) -> dict[str, Any]:
    """Returns DeepSpeed's setting `weight_quantization`, for weights that are quantised as the model is loaded.

    It takes no names of layers: all linear layers and embeddings are meant. The other setting, `post_init_quant`, takes
    names, and float16 only. `group_dim` 1 is the last dimension; asymmetric is all there is in DeepSpeed 0.19.8
    (deepspeed/inference/quantization/utils.py).

    Raises:
        EngineError: not 4 or 8 bits, or no size of a group.
    """
    if bits not in (4, 8):
        raise EngineError(f"weights can be quantised to 4 or 8 bits, not to {bits}")
    if group_size < 1:
        raise EngineError(f"the group size of quantised weights must be 1 or more, not {group_size}")
    settings = {"num_bits": bits, "group_size": group_size, "group_dim": 1, "symmetric": False}
    return {"quantized_initialization": settings}


def check_quantization(model: Path, parameters: Parameters, bits: Bits, group_size: int) -> None:
    """Checks that `parameters`, whose weights are in the folder `model`, can be quantised so.

    Raises:
        EngineError: the run's type is float16 or is not the one that the weights are saved in, or a weight's last
            dimension does not divide into groups; the message says what would do.
    """
    if parameters.dtype == torch.float16:
        # Its kernels for this type alone are compiled with nvcc at first use; for the others it computes with torch's.
        raise EngineError("quantised weights need --dtype bfloat16 or float32, not float16")
    for saved in sorted(_read_saved_types(model) & set(_TYPES)):
        # DeepSpeed quantises a weight in the type it was saved in, and then takes its bytes for the run's type.
        if _TYPES[saved] != parameters.dtype:
            name = str(_TYPES[saved]).removeprefix("torch.")
            raise EngineError(f"the weights in {model} are saved as {name}; quantised, they need --dtype {name}")
    wanted = [(name, parameter) for name, parameter in parameters.by_name.items() if parameter.quantizable]
    for name, parameter in wanted:
        last = parameter.shape[-1]
        # The whole numbers are kept in a tensor of the run's type, so a row of them must fill whole elements.
        if last % group_size or last * bits % (8 * parameters.dtype.itemsize):
            fits = _find_largest_group(wanted, parameters, bits, group_size)
            advice = f"groups of {fits} fit all weights" if fits else "this model cannot be quantised this way"
            raise EngineError(
                f"{name} has {last} columns, which do not divide into groups of {group_size} at {bits} bits: {advice}"
            )


def _read_saved_types(model: Path) -> set[str]:
    """Returns the types of the matrices in the safetensors files of a model folder, by their headers.

    A header is 8 bytes of length, then JSON (https://github.com/huggingface/safetensors#format). Pickled weights are
    not looked into.
    """
    types = set()
    for file in weight_files(model):
        if file.suffix != ".safetensors":
            continue
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        types |= {tensor["dtype"] for tensor in header.values() if len(tensor.get("shape", ())) > 1}
    return types


def _find_largest_group(wanted: list[tuple[str, Parameter]], parameters: Parameters, bits: Bits, limit: int) -> int:
    """Returns the largest group size up to `limit` that divides every last dimension; 0: none does."""
    columns = {parameter.shape[-1] for _, parameter in wanted}
    if any(last * bits % (8 * parameters.dtype.itemsize) for last in columns):
        return 0
    return next((size for size in range(limit, 0, -1) if all(last % size == 0 for last in columns)), 0)


def plan_quantized(parameters: Parameters, bits: Bits, group_size: int) -> Parameters:
    """Returns `parameters` with the sizes that they have once they are quantised, to plan with.

    A weight becomes bits/8 bytes an element, and a scale and a minimum of the run's type a group.
    """
    stored = {
        name: dataclasses.replace(
            parameter, numel=_count_stored(parameter.numel, bits, group_size, parameters.dtype.itemsize)
        )
        if parameter.quantizable
        else parameter
        for name, parameter in parameters.by_name.items()
    }
    return Parameters(stored, parameters.dtype)


def _count_stored(numel: int, bits: Bits, group_size: int, item_bytes: int) -> int:
    return numel * bits // 8 // item_bytes + 2 * (numel // group_size)
