"""Products of weights of 8 bits on a GPU, in Triton: of a linear layer, or of experts.

As `four_bits_kernel`; inputs are either of the weight's own 8 bits, with scales, or of 16 bits, to which the weights
are widened in registers then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from batchgen.engines.paged.experts.grouped_gemm import Sorting
from batchgen.engines.paged.experts.grouped_gemm_kernel import count_tiles, find_tile
from batchgen.engines.paged.quantised import four_bits_kernel
from batchgen.engines.paged.quantised.packing import Packed

_NEIGHBOURS = 8  # tiles of tokens that go through the rows together, and share the weights that are in the cache


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


TILES = (
    (16, Tile(16, 64, 128, 4, 4, 528)),
    (32, Tile(32, 64, 128, 4, 4, 528)),
    (64, Tile(64, 128, 128, 4, 4, 264)),
)
LARGEST = Tile(128, 128, 128, 8, 3)


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
    tiles = count_tiles(tokens, experts, tile.tokens) if sorting else triton.cdiv(tokens, tile.tokens)
    across, blocks = triton.cdiv(rows, tile.rows), triton.cdiv(columns, depth)
    splits = 1 if sorting or tiles > 1 else max(1, min(blocks // 2, tile.programs // across, 32))
    counters = four_bits_kernel.get_counters(inputs.device)
    sums = torch.empty((splits, tokens, rows), dtype=torch.float32, device=inputs.device) if splits > 1 else output
    constants: dict[str, Any] = {
        "GROUPED": sorting is not None, "EXPERTS": experts, "WIDE": max(2, triton.next_power_of_2(experts)),
        "TOP_K": sorting.top_k if sorting else 0, "BIAS": bias is not None, "SPLIT": splits > 1,
        "GROUP": group if groups > 1 else 0, "INPUT_GROUPS": 0 if input_scales is None else input_scales.shape[-1],
        "EVEN": columns % depth == 0, "ONCE": tiles == 1, "ROWS": tile.rows, "TOKENS": tile.tokens, "DEPTH": depth,
        "NEIGHBOURS": _NEIGHBOURS,
    }  # fmt: skip
    of_pairs = (sorting.order, sorting.offsets) if sorting else (output, output)
    scales_of_inputs = output if input_scales is None else input_scales.contiguous()
    _multiply[(tiles * across, splits)](
        inputs, scales_of_inputs, values, weight.scales, bias, output, sums, counters, *of_pairs,
        tiles, tokens, rows, columns, blocks, groups, inputs.stride(0), **constants, **tile.settings,
    )  # fmt: skip
    return output


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
    # Programs start in the order of their numbers: NEIGHBOURS tiles of tokens take the same rows, then the next.
    across = tl.cdiv(rows, ROWS)
    neighbours = tl.program_id(0) // (NEIGHBOURS * across)
    beside = tl.minimum(tiles - neighbours * NEIGHBOURS, NEIGHBOURS)
    rest = tl.program_id(0) % (NEIGHBOURS * across)
    number = neighbours * NEIGHBOURS + rest % beside
    if GROUPED:
        expert, first, end = find_tile(offsets, number, EXPERTS, WIDE, TOKENS)
    else:
        expert, first, end = number * 0, number * TOKENS, tokens
    if expert < EXPERTS:
        row = rest // beside * ROWS + tl.arange(0, ROWS)
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
        splits = tl.num_programs(1)
        share = tl.cdiv(blocks, splits)
        begin = tl.program_id(1) * share
        sums = tl.zeros([ROWS, TOKENS], tl.int32 if WHOLE and GROUP == 0 else tl.float32)
        for block in range(begin, tl.minimum(begin + share, blocks)):
            column = block * DEPTH
            if EVEN:
                mask, deep = inside[:, None], there[None, :]
            else:
                mask = inside[:, None] & (each < columns - column)[None, :]
                deep = there[None, :] & (each < columns - column)[:, None]
            if ONCE:
                numbers = tl.load(values_at + column, mask=mask, other=0.0, eviction_policy="evict_first")
            else:
                numbers = tl.load(values_at + column, mask=mask, other=0.0)
            given = tl.load(inputs_at + column, mask=deep, other=0.0)
            if WHOLE:
                part = tl.dot(numbers, given, out_dtype=tl.int32)
            elif INPUT_GROUPS > 0:
                # Sums inside a product of 8-bit floats have few bits: each block is added in float32.
                part = tl.dot(numbers, given, max_num_imprecise_acc=DEPTH)
            else:
                part = tl.dot(numbers.to(given.dtype), given)
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
        last = True
        if SPLIT:
            own = sums_of_splits + tl.program_id(1).to(tl.int64) * tokens * rows
            tl.store(own + to, total, mask=mask)
            tl.debug_barrier()
            last = tl.atomic_add(counters + tl.program_id(0), 1) == splits - 1
            if last:
                tl.debug_barrier()
                total = tl.zeros([ROWS, TOKENS], tl.float32)
                for split in range(splits):
                    other = sums_of_splits + tl.cast(split, tl.int64) * tokens * rows
                    total += tl.load(other + to, mask=mask, other=0.0, cache_modifier=".cg")
                tl.store(counters + tl.program_id(0), 0)
        if last:
            if GROUP == 0:
                total *= tl.load(scales_at, mask=inside, other=0.0)[:, None]
            if INPUT_GROUPS == 1:
                total *= tl.load(input_scales + token, mask=there, other=0.0)[None, :]
            if BIAS:
                total += tl.load(bias + expert * rows + row, mask=inside, other=0.0).to(tl.float32)[:, None]
            tl.store(output + to, total.to(output.dtype.element_ty), mask=mask)
