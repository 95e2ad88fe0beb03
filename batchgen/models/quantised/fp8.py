"""Method `fp8`: float8_e4m3fn with a scale for each block, as DeepSeek-V3 and Qwen3-…-FP8 have it, or one a tensor.

A layer X has `X.weight` [out, in] and `X.weight_scale_inv` [⌈out / 128⌉, ⌈in / 128⌉], which is multiplied whatever its
name says, or without dimensions. With fixed scales of inputs it has `X.activation_scale`, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from batchgen.models.quantised.format import Format, check_choices, take_block
from batchgen.models.quantised.packing import make_groups_even
from batchgen.models.quantised.stored import StoredTensor, StoredWeight, group_by_layer, take_part
from batchgen.models.quantised.weight import QuantisedWeight

FP8 = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_SCALES = ("weight_scale_inv", "scale", "weight_scale", "qscale_weight")
_INPUT_SCALES = ("activation_scale", "input_scale", "qscale_act")


@dataclass(frozen=True)
class Fp8(Format):
    """A checkpoint's own settings.

    Args:
        block: rows and columns of a block; None: a weight has one scale.
        is_static: the scales of inputs are fixed.
    """

    block: tuple[int, int] | None
    is_static: bool
    name = "fp8"
    ends = ("weight", *_SCALES, *_INPUT_SCALES)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Fp8:
        """Returns the format that a `quantization_config` describes.

        Raises:
            ModelError: it has a detail that is not read.
        """
        check_choices(cls.name, settings, {"fmt": ("e4m3",), "activation_scheme": ("dynamic", "static")})
        block = take_block(cls.name, settings, "weight_block_size")
        return cls(block, settings.get("activation_scheme") == "static")

    def find_weights(self, tensors: Mapping[str, StoredTensor]) -> list[StoredWeight]:
        layers = group_by_layer(tensors, self.ends)
        return [
            self._describe(layer, parts)
            for layer, parts in layers.items()
            if "weight" in parts and parts["weight"].dtype == FP8
        ]

    def _describe(self, layer: str, parts: Mapping[str, StoredTensor]) -> StoredWeight:
        weight = parts["weight"]
        end = next((end for end in _SCALES if end in parts), _SCALES[0])
        scale = take_part(layer, parts, end)
        scale.check_dtype(*SCALE_DTYPES)
        used = {"weight": weight, "scale": scale}
        block = None if scale.shape in ((), (1,)) else self.block
        rows, columns = weight.take_matrix_shape()
        if block is None:
            scale.check_shape((), (1,))
        else:
            scale.check_shape((-(-rows // block[0]), -(-columns // block[1])))
        if self.is_static:
            end = next((end for end in _INPUT_SCALES if end in parts), _INPUT_SCALES[0])
            used["input_scale"] = take_part(layer, parts, end)
            used["input_scale"].check_shape((), (1,))
        return StoredWeight(f"{layer}.weight", (rows, columns), used, partial(convert_fp8, block=block))


def convert_fp8(
    parts: Mapping[str, torch.Tensor],
    *,
    block: tuple[int, int] | None = None,
    rounds_inputs: bool = True,
) -> QuantisedWeight:
    """Returns the weight of tensors `weight` [out, in], `scale` and, if the scales of inputs are fixed, `input_scale`.

    Args:
        block: rows and columns of a block; None: `scale` is of the whole weight, or of each row, [out, 1].
        rounds_inputs: the inputs are of FP8, too.
    """
    values, scale = parts["weight"], _read_scale(parts["scale"])
    rows = len(values)
    if block is None:
        scale = scale.reshape(-1, 1).expand(rows, 1).contiguous()
    else:
        scale = scale.repeat_interleave(block[0], 0)[:rows].contiguous()
    weight = QuantisedWeight("fp8", values, scale)
    if rounds_inputs:
        weight = _round_inputs(weight, parts, 0 if block is None else block[1])
    return weight if block is None else make_groups_even(weight, block[1])


def _read_scale(scale: torch.Tensor) -> torch.Tensor:
    """Of 8 bits, it is an exponent: 2 to the power of the byte less 127."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float() if scale.dtype == torch.float8_e8m0fnu else scale


def _round_inputs(weight: QuantisedWeight, parts: Mapping[str, torch.Tensor], group: int) -> QuantisedWeight:
    if weight.shape[-1] % max(group, 1):
        return weight  # the last group of a token is shorter, which `round_inputs` does not know: they stay exact
    fixed = float(parts["input_scale"]) if "input_scale" in parts else None
    return replace(weight, inputs="fp8", inputs_scale=fixed, inputs_group=group)
