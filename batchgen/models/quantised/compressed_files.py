"""Weights that were rounded here, in the form of compressed-tensors: what `compressed_tensors` and others read."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from batchgen.models.quantised.rounding import Scheme
from batchgen.models.quantised.weight import QuantisedWeight

_FORMATS = {"fp8": "float-quantized", "int8": "int-quantized", "int4": "pack-quantized"}


def make_tensors(name: str, weight: QuantisedWeight) -> dict[str, torch.Tensor]:
    """Returns the tensors that a checkpoint has of a matrix [rows, columns].

    Args:
        name: of the parameter, which ends with "weight".
    """
    if weight.kind != "int4":
        return {name: weight.values, f"{name}_scale": weight.scales}
    # A word holds eight columns, the first in its lowest bits: those of `values`, which holds two in a byte.
    made = {f"{name}_packed": weight.values.contiguous().view(torch.int32), f"{name}_scale": weight.scales}
    made[f"{name}_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
    if weight.zeros is not None:
        made[f"{name}_zero_point"] = _pack_rows(weight.zeros)
    return made


def _pack_rows(numbers: torch.Tensor) -> torch.Tensor:
    """Returns numbers of 4 bits [rows, groups] as words [⌈rows / 8⌉, groups], the first row in the lowest bits."""
    rows, groups = numbers.shape
    padded = numbers.new_zeros((-(-rows // 8) * 8, groups))
    padded[:rows] = numbers
    pairs = padded[0::2] | (padded[1::2] << 4)  # [4 for each word, groups]
    in_words = pairs.view(-1, 4, groups).transpose(1, 2).reshape(-1).contiguous()
    return in_words.view(torch.int32).view(-1, groups)


def make_settings(scheme: Scheme, kept: Collection[str]) -> dict[str, Any]:
    """Returns the `quantization_config` of such a checkpoint.

    Args:
        kept: the names of the layers that are not rounded.
    """
    written, number = _FORMATS[scheme.kind], "float" if scheme.kind == "fp8" else "int"
    weights: dict[str, Any] = {"num_bits": 4 if scheme.kind == "int4" else 8, "type": number, "dynamic": False}
    if scheme.kind == "int4":
        weights |= {"symmetric": False, "strategy": "group", "group_size": scheme.group_size}
        inputs = None
    else:
        weights |= {"symmetric": True, "strategy": "channel"}
        inputs = {"num_bits": 8, "type": number, "dynamic": True, "symmetric": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": written}
    return {
        "quant_method": "compressed-tensors",
        "format": written,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(kept),
        "kv_cache_scheme": None,
    }
