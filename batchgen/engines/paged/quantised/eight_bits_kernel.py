"""Products of weights of 8 bits on a GPU, in Triton: of a linear layer, or of experts.

As `four_bits_kernel`; inputs are either of the weight's own 8 bits, with scales, or of 16 bits, to which the weights
are widened in registers then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from batchgen.engines.paged.experts.grouped_gemm import Sorting
from batchgen.engines.paged.quantised.packed import Packed
from batchgen.engines.paged.quantised.programs import find_program, get_counters, join_splits, plan_launch


class Tile(NamedTuple):
    """What one program computes, and how."""

    tokens: int
    rows: int
    columns: int  # of the weights, at once
    warps: int
    stages: int  # of `columns` each, under way at once
    programs: int = 0  # that columns are split for, if tokens are one tile; 0: never split

    @property
    def settings(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# The best of `benchmarks/quantised.py tiles llama-8b` on an H200, by the sum over its layers.
TILES = (
    (16, Tile(16, 64, 256, 4, 4, 132)),
    (32, Tile(32, 64, 256, 4, 4, 132)),
    (64, Tile(64, 64, 128, 4, 6, 132)),
    (128, Tile(128, 64, 128, 4, 4, 132)),
)
LARGEST = Tile(128, 64, 128, 4, 4)


def choose_tile(tokens: int, experts: int = 1) -> Tile:
    """The tile for so many tokens, or pairs of so many experts."""
    return next((tile for most, tile in TILES if tokens <= most * experts), LARGEST)


class Wanted(NamedTuple):
    """What a product is wanted in, and of what."""

    dtype: torch.dtype  # of the result
    sorting: Sorting | None = None  # of the pairs of experts
    tile: Tile | None = None  # None: chosen by shape


def multiply(
    inputs: torch.Tensor,
    input_scales: torch.Tensor | None,
    weight: Packed,
    bias: torch.Tensor | None,
    wanted: Wanted,
) -> torch.Tensor:
    """Multiplies inputs [tokens, columns] by a weight; with `wanted.sorting`, the row of each pair by its expert's.

    Args:
        inputs: of 8 bits, with `input_scales` [tokens, groups or 1]; or of 16, which need none.
        weight: of 8 bits, packed; of experts, if there is a `sorting`.
        bias: [rows], or [experts, rows].

    Returns:
        [tokens, rows], or [pairs, rows], sorted; rows of pairs without an expert are not written.
    """
    dtype, sorting, tile = wanted
    values = weight.values if sorting else weight.values[None]
    experts, rows, columns = values.shape
    tokens = len(sorting.order) if sorting else len(inputs)
    output = torch.empty((tokens, rows), dtype=dtype, device=inputs.device)
    if tokens == 0:
        return output
    inputs = inputs if inputs.stride(1) == 1 else inputs.contiguous()
    tile = tile or choose_tile(tokens, experts)
    groups = weight.scales.shape[-2]
    group = -(-columns // groups)
    depth = tile.columns
    while groups > 1 and group % depth:
        depth //= 2
    blocks = triton.cdiv(columns, depth)
    launch = plan_launch(output, blocks, experts, sorting, tile)
    constants = launch.constants | {
        "BIAS": bias is not None, "GROUP": group if groups > 1 else 0, "EVEN": columns % depth == 0, "DEPTH": depth,
        "INPUT_GROUPS": 0 if input_scales is None else input_scales.shape[-1],
    }  # fmt: skip
    scales_of_inputs = output if input_scales is None else input_scales.contiguous()
    _multiply[launch.grid](
        inputs, scales_of_inputs, values, weight.scales, bias, output, launch.sums, get_counters(inputs.device),
        *launch.pairs, launch.tiles, tokens, rows, columns, blocks, groups, inputs.stride(0), **constants,
        **tile.settings,
    )  # fmt: skip
    return output


@triton.jit
def _load_numbers(at, inside, deep, EVEN: tl.constexpr, ONCE: tl.constexpr):
    """Those of a block; if they are read ONCE, they need not stay in the cache."""
    mask = inside[:, None] if EVEN else inside[:, None] & deep[None, :]
    if ONCE:
        numbers = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        numbers = tl.load(at, mask=mask, other=0.0)
    return numbers


@triton.jit
def _multiply_block(numbers, given, ROUNDED: tl.constexpr, DEPTH: tl.constexpr):
    """The product with inputs of the same 8 bits, ROUNDED, or of 16."""
    if not ROUNDED:
        part = tl.dot(numbers.to(given.dtype), given)
    elif given.dtype == tl.int8:
        part = tl.dot(numbers, given, out_dtype=tl.int32)
    else:
        # Sums inside a product of 8-bit floats have few bits: each block is added in float32.
        part = tl.dot(numbers, given, max_num_imprecise_acc=DEPTH)
    return part


@triton.jit(do_not_specialize=["tiles", "tokens", "blocks", "groups"])
def _multiply(
    inputs, input_scales, values, scales, bias, output, sums_of_splits, counters, order, offsets,
    tiles, tokens, rows, columns, blocks, groups, input_row,
    GROUPED: tl.constexpr, EXPERTS: tl.constexpr, WIDE: tl.constexpr, TOP_K: tl.constexpr, BIAS: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, INPUT_GROUPS: tl.constexpr, EVEN: tl.constexpr, ONCE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """One tile, [ROWS, TOKENS]. `TOP_K` is 0 if `inputs` has a row a pair; `GROUP` if a row has one scale."""
    WHOLE: tl.constexpr = inputs.dtype.element_ty == tl.int8
    expert, first, end, first_row = find_program(
        offsets, tiles, tokens, rows, GROUPED, EXPERTS, WIDE, TOKENS, ROWS, NEIGHBOURS
    )
    if expert < EXPERTS:
        row = first_row + tl.arange(0, ROWS)
        inside = row < rows
        place = first + tl.arange(0, TOKENS)
        there = place < end
        each = tl.arange(0, DEPTH)
        token = place
        if TOP_K > 0:
            token = tl.load(order + place, mask=there, other=0) // TOP_K
        inputs_at = inputs + token.to(tl.int64)[None, :] * input_row + each[:, None]
        values_at = values + expert.to(tl.int64) * rows * columns + row.to(tl.int64)[:, None] * columns + each[None, :]
        scales_at = scales + expert.to(tl.int64) * groups * rows + row
        share = tl.cdiv(blocks, tl.num_programs(1))
        begin = tl.program_id(1) * share
        sums = tl.zeros([ROWS, TOKENS], tl.int32 if WHOLE and GROUP == 0 else tl.float32)
        for block in range(begin, tl.minimum(begin + share, blocks)):
            column = block * DEPTH
            deep = each < columns - column
            numbers = _load_numbers(values_at + column, inside, deep, EVEN, ONCE)
            if EVEN:
                given = tl.load(inputs_at + column, mask=there[None, :], other=0.0)
            else:
                given = tl.load(inputs_at + column, mask=deep[:, None] & there[None, :], other=0.0)
            part = _multiply_block(numbers, given, INPUT_GROUPS > 0, DEPTH)
            if GROUP == 0:
                sums += part
            else:
                group = column // GROUP
                scale = tl.load(scales_at + group * rows, mask=inside, other=0.0)[:, None]
                if INPUT_GROUPS > 1:
                    of_inputs = tl.load(input_scales + token * INPUT_GROUPS + group, mask=there, other=0.0)
                    scale = scale * of_inputs[None, :]
                sums += part.to(tl.float32) * scale
        mask = inside[:, None] & there[None, :]
        to = place.to(tl.int64)[None, :] * rows + row[:, None]
        total = sums.to(tl.float32)
        is_last = True
        if SPLIT:
            total, is_last = join_splits(total, sums_of_splits, counters, to, mask, tokens * rows)
        if is_last:
            if GROUP == 0:
                total *= tl.load(scales_at, mask=inside, other=0.0)[:, None]
            if INPUT_GROUPS == 1:
                total *= tl.load(input_scales + token, mask=there, other=0.0)[None, :]
            if BIAS:
                total += tl.load(bias + expert * rows + row, mask=inside, other=0.0).to(tl.float32)[:, None]
            tl.store(output + to, total.to(output.dtype.element_ty), mask=mask)
