"""The bytes of a model whose weights are of 8 or 4 bits, from its config alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from batchgen.models.parameters import Parameter, Parameters
from batchgen.models.quantised import find_format
from batchgen.models.quantised.compressed_tensors import CompressedTensors
from batchgen.models.quantised.rounding import GROUP_SIZES, Scheme

Stored = Literal["", "fp8", "int8", "int4", "mxfp4"]
"""How weights are stored; "": as they are computed with."""

_BLOCK_OF_MXFP4 = 32  # numbers that share a scale of 8 bits
_METHODS: Mapping[str, Stored] = {"fp8": "fp8", "awq": "int4", "gptq": "int4", "mxfp4": "mxfp4"}


def find_stored(config: Any) -> Stored:
    """Returns how a checkpoint with this Transformers config stores its weights; "" also for formats not known here."""
    found = find_format(config)
    if isinstance(found, CompressedTensors):
        kinds = {scheme.kind for _, scheme in found.schemes}
        return next(kind for kind in ("fp8", "int8", "int4") if kind in kinds)  # the largest of several
    return "" if found is None else _METHODS.get(found.name, "")


def round_parameters(parameters: Parameters, stored: Stored, group_size: int = 0) -> Parameters:
    """Returns `parameters` with the sizes that they have in memory once they are rounded, to plan with.

    Args:
        group_size: of int4; 0: the one that would be chosen.
    """
    chosen = {name: one for name, one in parameters.by_name.items() if one.columns}
    if not stored or not chosen:
        return parameters
    if stored == "mxfp4":  # which has nothing but experts in it
        chosen = {name: one for name, one in chosen.items() if len(one.shape) == 3}
    group = group_size
    if stored == "int4" and not group:
        try:
            group = Scheme("int4").fit(one.columns for one in chosen.values()).group_size
        except ValueError:  # the engine will say so
            group = GROUP_SIZES[-1]
    sizes = {name: _count_bytes(one, stored, group) for name, one in chosen.items()}
    item = parameters.dtype.itemsize
    made = {
        name: replace(one, numel=-(-sizes[name] // item)) if name in sizes else one
        for name, one in parameters.by_name.items()
    }
    return Parameters(made, parameters.dtype)


def _count_bytes(parameter: Parameter, stored: Stored, group: int) -> int:
    """Returns the bytes of the numbers, scales and zeros of a weight, as `QuantisedWeight` holds them."""
    numbers = math.prod(parameter.shape)
    if stored == "mxfp4":
        return numbers // 2 + numbers // _BLOCK_OF_MXFP4
    if stored == "int4":
        return numbers // 2 + numbers // group * 3  # a scale of 16 bits and a zero of 8
    return numbers + numbers // parameter.columns * 4
