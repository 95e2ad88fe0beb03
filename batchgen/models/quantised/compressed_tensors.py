"""Method `compressed-tensors`: FP8, int8 and int4, as llm-compressor writes them.

`config_groups` has settings for groups of layers, which it names by `targets`. A layer X of FP8 or int8 has `X.weight`
[out, in] and `X.weight_scale` (one, one a row [out, 1], or one a block); of int4 `X.weight_packed` int32
[out, ⌈in / 8⌉], whose words hold eight columns, the first lowest, with 8 added; `X.weight_scale` [out, in / group] and,
if it is not symmetric, `X.weight_zero_point` int32 [⌈out / 8⌉, in / group], packed along its rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from batchgen.models.quantised.compressed_scheme import NAME, Scheme
from batchgen.models.quantised.format import Format, refuse
from batchgen.models.quantised.fp8 import FP8, SCALE_DTYPES, convert_fp8
from batchgen.models.quantised.packing import make_groups_even, unpack_words, view_words_as_pairs
from batchgen.models.quantised.stored import StoredTensor, StoredWeight, group_by_layer, take_part
from batchgen.models.quantised.weight import QuantisedWeight

_INT8, _FLOATS = "I8", ("F32", "BF16", "F16")
_MARKS = ("weight_packed", "weight_scale")  # a layer with one of them is quantised


@dataclass(frozen=True)
class CompressedTensors(Format):
    """A checkpoint's own settings.

    Args:
        schemes: the targets of each group, and its settings.
    """

    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    name = NAME
    ends = (
        *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        *("weight_global_scale", "input_scale", "input_zero_point", "input_global_scale"),
    )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> CompressedTensors:
        """Returns the format that a `quantization_config` describes.

        What its `kv_cache_scheme` says is not looked at; with that alone, weights are of 16 bits.

        Raises:
            ModelError: it has a detail that is not read.
        """
        sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense":
            refuse(NAME, f"sparse weights ({sparsity})")
        if (settings.get("transform_config") or {}).get("config_groups"):
            refuse(NAME, "rotations of the activations (transform_config)")
        groups = settings.get("config_groups") or {}
        if not isinstance(groups, dict) or not (groups or settings.get("kv_cache_scheme")):
            refuse(NAME, "no config_groups")
        schemes = [
            (tuple(group.get("targets") or ()), Scheme.of(group, settings.get("format"))) for group in groups.values()
        ]
        return cls(tuple(schemes))

    @property
    def has_weights(self) -> bool:  # type: ignore[override]
        return bool(self.schemes)

    def find_weights(self, tensors: Mapping[str, StoredTensor]) -> list[StoredWeight]:
        layers = group_by_layer(tensors, self.ends)
        return [self._describe(layer, parts) for layer, parts in layers.items() if any(end in parts for end in _MARKS)]

    def _find_scheme(self, layer: str) -> Scheme:
        """Returns the settings of a layer, in the order of the format's own library (`match_targets`): those of its
        name, of an expression, of its class; and of one target that two groups have, those of the last group."""
        if len(self.schemes) == 1:
            return self.schemes[0][1]
        by_target = {target: scheme for targets, scheme in self.schemes for target in targets}
        in_order = sorted(by_target, key=lambda target: ("re:" in target, target))
        # A target that names no layer is a class of modules.
        named = [target for target in in_order if _names(target, layer)] + [t for t in in_order if t == "Linear"]
        if not named:
            refuse(NAME, f"no group of config_groups for the layer {layer}")
        return by_target[named[0]]

    def _describe(self, layer: str, parts: Mapping[str, StoredTensor]) -> StoredWeight:
        if "weight_g_idx" in parts:
            refuse(NAME, f"columns in an order of their own ({layer}.weight_g_idx)")
        scheme = self._find_scheme(layer)
        if scheme.kind == "int4":
            return _describe_packed(layer, parts, scheme)
        weight, scale = take_part(layer, parts, "weight"), take_part(layer, parts, "weight_scale")
        weight.check_dtype(FP8 if scheme.kind == "fp8" else _INT8)
        scale.check_dtype(*(SCALE_DTYPES if scheme.kind == "fp8" else _FLOATS))
        rows, columns = weight.take_matrix_shape()
        if scheme.block is not None:
            scale.check_shape([-(-size // step) for size, step in zip(weight.shape, scheme.block, strict=True)])
        else:
            scale.check_shape(
                *([()] if scheme.kind == "fp8" else []), *(((rows, 1), (rows,)) if scheme.by_rows else ((1,),))
            )
        used = {"weight": weight, "scale": scale}
        if scheme.is_static:
            used["input_scale"] = take_part(layer, parts, "input_scale")
            used["input_scale"].check_shape((), (1,))
        convert = partial(convert_fp8, block=scheme.block, rounds_inputs=bool(scheme.inputs))
        if scheme.kind == "int8":
            convert = partial(_convert_int8, rounds_inputs=bool(scheme.inputs))
        return StoredWeight(f"{layer}.weight", (rows, columns), used, convert)


def _names(target: str, layer: str) -> bool:
    """Returns whether a target names this layer: as a whole, or as an expression that its beginning matches."""
    if target.startswith("re:"):
        return re.match(target[3:], layer) is not None
    return target == layer


def _describe_packed(layer: str, parts: Mapping[str, StoredTensor], scheme: Scheme) -> StoredWeight:
    words, scale = take_part(layer, parts, "weight_packed"), take_part(layer, parts, "weight_scale")
    words.check_dtype("I32")
    scale.check_dtype(*_FLOATS)
    rows, _ = words.take_matrix_shape()
    shape = take_part(layer, parts, "weight_shape")
    shape.check_shape((2,))
    columns = int(shape.view()[1])
    words.check_shape((rows, -(-columns // 8)))
    group = scheme.group or columns
    groups = -(-columns // group)
    scale.check_shape((rows, groups))
    used = {"words": words, "scale": scale}
    if not scheme.is_symmetric:
        used["zeros"] = take_part(layer, parts, "weight_zero_point")
        used["zeros"].check_dtype("I32")
        used["zeros"].check_shape((-(-rows // 8), groups))
    convert = partial(_convert_packed, columns=columns, group=group)
    return StoredWeight(f"{layer}.weight", (rows, columns), used, convert)


def _convert_packed(parts: Mapping[str, torch.Tensor], *, columns: int, group: int) -> QuantisedWeight:
    zeros = None
    if "zeros" in parts:
        zeros = unpack_words(parts["zeros"].t().contiguous()).t()[: len(parts["words"])].contiguous()
    values = view_words_as_pairs(parts["words"], columns)
    return make_groups_even(QuantisedWeight("int4", values, parts["scale"], zeros), group)


def _convert_int8(parts: Mapping[str, torch.Tensor], *, rounds_inputs: bool) -> QuantisedWeight:
    values = parts["weight"]
    scales = parts["scale"].reshape(-1, 1).expand(len(values), 1).contiguous()
    fixed = float(parts["input_scale"]) if "input_scale" in parts else None
    return QuantisedWeight("int8", values, scales, inputs="int8" if rounds_inputs else "", inputs_scale=fixed)
