"""Widens weights of 4 and 8 bits to 16 bits on a GPU, in Triton: where tokens are many, the product takes longer."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from batchgen.engines.paged.quantised.packed import Packed
from batchgen.engines.paged.quantised.packing import PART
from batchgen.engines.paged.quantised.parts import count_groups, find_group, load_four_scales
from batchgen.engines.paged.quantised.parts import widen as widen_half
from batchgen.engines.paged.quantised.programs import has_sm_90

_ROWS = 32  # of a program


def widen(weight: Packed, columns: int, dtype: torch.dtype, begin: int = 0, end: int | None = None) -> torch.Tensor:
    """Returns the rows from `begin` to `end` of a linear layer's packed weight, [end - begin, columns]."""
    all_rows = weight.values.shape[-2]
    rows = (all_rows if end is None else end) - begin
    output = torch.empty((rows, columns), dtype=dtype, device=weight.values.device)
    groups = weight.scales.shape[-2]
    group = find_group(weight, columns)
    across = triton.cdiv(rows, _ROWS)
    if weight.form in ("fp8", "int8"):
        constants = {"GROUP": group, "ROWS": _ROWS, "COLUMNS": 128}
        _widen_8[(across, triton.cdiv(columns, 128))](
            weight.values, weight.scales, output, begin, rows, all_rows, columns, groups, **constants
        )
        return output
    blocks = weight.values.shape[0]
    of_4_bits: dict[str, Any] = {
        "KIND": weight.form, "ZEROS": weight.zeros is not None, "GROUP": group, "GROUPS": count_groups(group),
        "PART": PART, "ROWS": _ROWS, "ASSEMBLY": has_sm_90(output.device),
    }  # fmt: skip
    _widen_4[(across, blocks, 2)](
        weight.values, weight.scales, weight.zeros, output, begin, rows, all_rows, columns, groups, **of_4_bits
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
def _store_part(numbers, scale, to, column, columns, each, inside):
    numbers = numbers.to(tl.float32) * scale[:, None]
    tl.store(to + column, numbers.to(to.dtype.element_ty), mask=inside[:, None] & (each < columns - column)[None, :])


@triton.jit
def _widen_4(
    values, scales, zeros, output, begin, rows, all_rows, columns, groups,
    KIND: tl.constexpr, ZEROS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Some rows of a block, half of its parts."""
    DTYPE: tl.constexpr = output.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    each = tl.arange(0, PART)
    block, stored = tl.program_id(1), begin + row
    words = tl.load(
        values + (block.to(tl.int64) * all_rows + stored)[:, None] * PART + each[None, :], mask=inside[:, None], other=0
    )
    to = output + row.to(tl.int64)[:, None] * columns + each[None, :]
    column = block * 8 * PART
    for half in tl.static_range(2):
        if tl.program_id(2) == half:
            column += half * 4 * PART
            first, second, third, fourth = widen_half(
                words, zeros, stored, column, all_rows, groups, inside,
                KIND, ZEROS, GROUP, GROUPS, PART, half, DTYPE, ASSEMBLY,
            )  # fmt: skip
            scale_1, scale_2, scale_3, scale_4 = load_four_scales(
                scales, stored, column, all_rows, groups, inside, KIND, GROUP, GROUPS, PART
            )
            _store_part(first, scale_1, to, column, columns, each, inside)
            _store_part(second, scale_2, to, column + PART, columns, each, inside)
            _store_part(third, scale_3, to, column + 2 * PART, columns, each, inside)
            _store_part(fourth, scale_4, to, column + 3 * PART, columns, each, inside)
