"""The order in memory in which the kernels read a quantised weight.

Of 4 bits, a block is `BLOCK` adjacent columns of all rows, eight parts of `PART` columns. A word of 32 bits holds, from
its lowest bits on, the numbers in the same place of the eight parts: a product of matrix units takes a part, whose
numbers are in one place of all words. The words that a program reads for a block are adjacent; scales and zeros have
their rows side by side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from batchgen.engines.paged.quantised import humming_products
from batchgen.engines.paged.quantised.packed import PLAIN, Packed
from batchgen.models.quantised.weight import QuantisedWeight

FP8_SINCE = (8, 9)
"""Compute capability of the first GPUs that know floats of 8 bits."""

PART = 32
"""Columns of a part of a block; the group of a weight is a multiple of it."""

BLOCK = 8 * PART
"""Columns of a block."""


MOST_EXPONENT = 128
"""Of the scales of mxfp4, + 127: `nibbles` multiplies by 2^(exponent - 1), which bfloat16 has up to 2^127."""


def pack(weight: QuantisedWeight, dtype: torch.dtype, bias: torch.Tensor | None = None) -> Packed:
    """Returns the tensors of a weight for the operators, on its device; a weight on a CPU stays as it is.

    Its `order` is not considered: the inputs have to be in it.

    Args:
        dtype: the type of the inputs, before they are rounded.
        bias: that every product adds, [rows] or [experts, rows]; it is part of the result where that is of use.
    """
    if weight.values.device.type != "cuda":
        return Packed(PLAIN + weight.kind, weight.values, weight.scales, weight.zeros)
    if humming_products.covers(weight, dtype):
        return humming_products.pack(weight, dtype, bias)
    from batchgen.engines.paged.quantised import programs  # Triton comes with a torch for GPUs alone

    programs.prepare(weight.values.device)
    return pack_for_kernels(weight)


def can_hold(weight: QuantisedWeight, dtype: torch.dtype) -> bool:
    """Whether the operators take a weight where it is, in a model that computes in `dtype`.

    On a CPU all; on a GPU what kernels cover, in a model of 16 bits; and 8-bit floats where the GPU has them.
    """
    device = weight.values.device
    if device.type != "cuda":
        return True
    has_type = weight.kind != "fp8" or torch.cuda.get_device_capability(device) >= FP8_SINCE
    return has_type and dtype.itemsize == 2 and (covers(weight) or humming_products.covers(weight, dtype))


def covers(weight: QuantisedWeight) -> bool:
    """Whether the kernels take a weight: by its kind, and by its groups."""
    if weight.kind == "mxfp4":
        return weight.group == PART and int(weight.scales.view(torch.uint8).max()) <= MOST_EXPONENT
    fits = weight.scales.shape[-1] == 1 or weight.group % PART == 0
    return fits and weight.inputs_group in (0, weight.group)


def pack_for_kernels(weight: QuantisedWeight) -> Packed:
    """As `pack`, for a weight that the kernels cover, on any device."""
    scales = weight.scales
    if weight.kind == "mxfp4":
        scales = pack_exponents(scales.view(torch.uint8))
    elif weight.kind in ("fp8", "int8"):
        scales = scales.float()
    scales = scales.transpose(-1, -2).contiguous()
    zeros = None if weight.zeros is None else weight.zeros.transpose(-1, -2).int().contiguous()
    if weight.kind in ("fp8", "int8"):
        return Packed(weight.kind, weight.values.contiguous(), scales, zeros)
    return Packed(weight.kind, _pack_nibbles(weight.values), scales, zeros)


def pack_exponents(exponents: torch.Tensor) -> torch.Tensor:
    """[…, rows, groups], uint8, to […, rows, halves of blocks], int32: a word holds those of the four parts of a half.

    What the compiler reads ahead has four bytes.
    """
    filled = F.pad(exponents, (0, -exponents.shape[-1] % (BLOCK // PART))).contiguous()
    return filled.view(torch.int32)


def _pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """[…, rows, columns / 2] to […, blocks, rows, PART]; columns are filled up to a multiple of BLOCK."""
    if values.ndim == 3:  # one expert after the other: what is needed on the way is larger than the result
        return torch.stack([_pack_nibbles(one) for one in values])
    values = F.pad(values, (0, -values.shape[-1] % (BLOCK // 2)))
    single = torch.stack([values & 15, values >> 4], -1).view(len(values), -1, BLOCK // PART, PART)
    bytes_of_words = single[:, :, 0::2] | single[:, :, 1::2] << 4  # [rows, blocks, 4, PART], as bytes lie in memory
    words = bytes_of_words.permute(1, 0, 3, 2).contiguous().view(torch.int32)
    return words.squeeze(-1)
