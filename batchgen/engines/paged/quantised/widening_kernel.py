"""Widens weights of 4 and 8 bits to 16 bits on a GPU, in Triton: for so many tokens that the product is what takes time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batchgen.engines.paged.quantised.four_bits_kernel import _find_scales
from batchgen.engines.paged.quantised.nibbles import widen_e2m1, widen_int4
from batchgen.engines.paged.quantised.packing import Packed

_ROWS = 32  # of a program


def widen(
    weight: Packed, columns: int, dtype: torch.dtype, begin: int = 0, end: int | None = None
) -> torch.Tensor:
    """Returns the rows from `begin` to `end` of a linear layer's packed weight, [end - begin, columns]."""
    all_rows = weight.values.shape[-2]
    rows = (all_rows if end is None else end) - begin
    output = torch.empty((rows, columns), dtype=dtype, device=weight.values.device)
    groups = weight.scales.shape[-2]
    group = -(-columns // groups) if groups > 1 else 1 << 30
    across = triton.cdiv(rows, _ROWS)
    if weight.form in ("fp8", "int8"):
        constants = {"GROUP": group, "ROWS": _ROWS, "COLUMNS": 128}
        _widen_8[(across, triton.cdiv(columns, 128))](
            weight.values, weight.scales, output, begin, rows, all_rows, columns, groups, **constants
        )
        return output
    blocks, _, half = weight.values.shape
    constants = {
        "KIND": weight.form, "ZEROS": weight.zeros is not None, "GROUP": group, "HALF": half, "ROWS": _ROWS,
        "ASSEMBLY": output.device.type == "cuda",
    }  # fmt: skip
    _widen_4[(across, blocks)](
        weight.values, weight.scales, weight.zeros, output, begin, rows, all_rows, columns, groups, **constants
    )
    return output


@triton.jit
def _widen_8(
    values, scales, output, begin, rows, all_rows, columns, groups,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    numbers = tl.load(values + (begin + row).to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0.0)
    group = tl.minimum(column // GROUP, groups - 1)
    scale = tl.load(scales + group[None, :] * all_rows + (begin + row)[:, None], mask=mask, other=0.0)
    numbers = numbers.to(tl.float32) * scale.to(tl.float32)
    to = output + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(to, numbers.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _widen_4(
    values, scales, zeros, output, begin, rows, all_rows, columns, groups,
    KIND: tl.constexpr, ZEROS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = output.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    each = tl.arange(0, HALF)
    block = tl.program_id(1)
    stored = begin + row
    at = values + (block.to(tl.int64) * all_rows + stored)[:, None] * HALF + each[None, :]
    bytes = tl.load(at, mask=inside[:, None], other=0)
    column = block * 2 * HALF
    low_at = tl.minimum(column // GROUP, groups - 1) * all_rows + stored
    high_at = tl.minimum((column + HALF) // GROUP, groups - 1) * all_rows + stored
    if KIND == "mxfp4":
        low, high = widen_e2m1(bytes, DTYPE, ASSEMBLY)
    else:
        if ZEROS:
            low_zero = tl.load(zeros + low_at, mask=inside, other=0).to(tl.float32)
            high_zero = tl.load(zeros + high_at, mask=inside, other=0).to(tl.float32)
        else:
            low_zero = tl.full([ROWS], 8.0, tl.float32)
            high_zero = low_zero
        low, high = widen_int4(bytes, low_zero, high_zero, DTYPE, ASSEMBLY)
    low = low.to(tl.float32) * _find_scales(scales, low_at, inside, KIND)[:, None]
    high = high.to(tl.float32) * _find_scales(scales, high_at, inside, KIND)[:, None]
    to = output + row.to(tl.int64)[:, None] * columns + column + each[None, :]
    tl.store(to, low.to(DTYPE), mask=inside[:, None] & (each < columns - column)[None, :])
    tl.store(to + HALF, high.to(DTYPE), mask=inside[:, None] & (each < columns - column - HALF)[None, :])
