"""The order in memory in which the kernels read a quantised weight.

Of 4 bits, a block is 2 × `half` adjacent columns of all rows. Its byte [row, i] holds column i of the block in its low
half and column `half` + i in its high one: each half of a byte is multiplied by adjacent inputs, and the bytes that a
program reads for a block are adjacent, too. Scales and zeros have their rows side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from batchgen.models.quantised.weight import QuantisedWeight

PLAIN = "plain "
"""Begins the form of a weight whose tensors are those of its QuantisedWeight: on a CPU, and what no kernel covers."""

HALVES = (64, 32)
"""Columns of half a block; the group of a weight is a multiple of it."""


class Packed(NamedTuple):
    """The tensors that the operators take. `…` is nothing, or the experts."""

    form: str  # the kind of the weight; behind PLAIN, if it is not packed
    values: torch.Tensor  # 8 bits: […, rows, columns]; 4 bits: […, blocks, rows, half]
    scales: torch.Tensor  # […, groups, rows]: float32, float16 or bfloat16; of mxfp4 uint8, the exponent + 127
    zeros: torch.Tensor | None  # […, groups, rows], uint8


def pack(weight: QuantisedWeight) -> Packed:
    """Returns the tensors of a weight for the operators, on its device; a weight on a CPU stays as it is.

    Its `order` is not considered: the inputs have to be in it.
    """
    if weight.values.device.type != "cuda" or not covers(weight):
        return Packed(PLAIN + weight.kind, weight.values, weight.scales, weight.zeros)
    return pack_for_kernels(weight)


def covers(weight: QuantisedWeight) -> bool:
    """Whether the kernels take a weight: by its kind, and by its groups."""
    return weight.inputs_group in (0, weight.group) and find_half(weight) > 0


def find_half(weight: QuantisedWeight) -> int:
    """Returns how many columns share scales for certain, of `HALVES`; 0: fewer."""
    if weight.scales.shape[-1] == 1:
        return HALVES[0]
    return next((half for half in HALVES if weight.group % half == 0), 0)


def pack_for_kernels(weight: QuantisedWeight) -> Packed:
    """As `pack`, for a weight that the kernels cover, on any device."""
    scales = weight.scales
    if weight.kind == "mxfp4":
        scales = scales.view(torch.uint8)
    elif weight.kind in ("fp8", "int8"):
        scales = scales.float()
    scales = scales.transpose(-1, -2).contiguous()
    zeros = None if weight.zeros is None else weight.zeros.transpose(-1, -2).contiguous()
    if weight.kind in ("fp8", "int8"):
        return Packed(weight.kind, weight.values.contiguous(), scales, zeros)
    return Packed(weight.kind, _pack_nibbles(weight.values, find_half(weight)), scales, zeros)


def _pack_nibbles(values: torch.Tensor, half: int) -> torch.Tensor:
    """[…, rows, columns / 2] to […, blocks, rows, half]; columns are filled up to a multiple of 2 × half."""
    if values.ndim == 3:  # of one expert after the other: what is needed on the way is as large as the result
        packed = [_pack_nibbles(one, half) for one in values]
        return torch.stack(packed)
    values = F.pad(values, (0, -values.shape[-1] % half))
    single = torch.stack([values & 15, values >> 4], -1)
    blocks = single.view(len(values), -1, 2, half)
    return (blocks[:, :, 0] | blocks[:, :, 1] << 4).transpose(0, 1).contiguous()
