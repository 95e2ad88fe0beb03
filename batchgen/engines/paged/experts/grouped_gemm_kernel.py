"""Products of sorted pairs with their experts' weights on a GPU, in Triton: as `grouped_gemm.multiply_in_loop`.

A program computes a tile: some pairs of one expert, and some columns. How many tiles each expert needs stands in the
offsets, which stay on the GPU; so as many programs are launched as any routing of so many pairs could need, and each
finds its expert in the offsets, or that it is not needed. Weights are the left side of the product, so that all rows
of a matrix unit work however few pairs an expert has, and pairs are gathered while they are read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from batchgen.engines.paged.experts.grouped_gemm import Sorting


class Tile(NamedTuple):
    """What one program computes, and how."""

    pairs: int
    columns: int
    depth: int  # of the weights, at once
    warps: int
    stages: int  # of `depth` each, under way at once


# By the most pairs that an expert has on average: within a few per cent of the best that benchmarks/experts.py found.
TILES = (
    (8, Tile(16, 64, 128, 4, 4)),
    (24, Tile(32, 64, 128, 4, 4)),
    (96, Tile(64, 128, 64, 4, 4)),
)
LARGEST = Tile(128, 128, 64, 8, 3)
_FLOAT32 = Tile(32, 64, 32, 4, 2)  # no matrix units, and twice the bytes

_NEIGHBOURS = 8  # tiles of pairs that go through the columns together, and share the weights that are in the cache


def choose_tile(pairs: int, experts: int, dtype: torch.dtype) -> Tile:
    """The tile for so many pairs of so many experts."""
    if dtype.itemsize > 2:
        return _FLOAT32
    return next((tile for most, tile in TILES if pairs <= most * experts), LARGEST)


def count_tiles(pairs: int, experts: int, size: int) -> int:
    """How many tiles of `size` pairs any routing can need.

    An expert with n pairs needs ⌈n / size⌉ ≤ (n + size - 1) / size, and at most `pairs` experts have any.
    """
    return min(pairs, (pairs + min(pairs, experts) * (size - 1)) // size)


def multiply(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sorting: Sorting,
    tile: Tile | None = None,
) -> torch.Tensor:
    """As `grouped_gemm.multiply_in_loop`, with sums in float32; `tile` is chosen by shape unless it is given."""
    (experts, columns, depth), pairs = weight.shape, len(sorting.order)
    inputs = inputs if inputs.stride(1) == 1 else inputs.contiguous()
    bias = None if bias is None else bias.contiguous()
    output = torch.empty((pairs, columns), dtype=inputs.dtype, device=inputs.device)
    if pairs == 0:
        return output
    tile = tile or choose_tile(pairs, experts, inputs.dtype)
    tiles = count_tiles(pairs, experts, tile.pairs)
    grid = (tiles * triton.cdiv(columns, tile.columns),)
    constants: dict[str, Any] = {
        "EXPERTS": experts,
        "WIDE": max(2, triton.next_power_of_2(experts)),
        "TOP_K": sorting.top_k,
        "BIAS": bias is not None,
        "EVEN": depth % tile.depth == 0,
        "PRECISION": "ieee" if inputs.dtype == torch.float32 else "tf32",
        "NEIGHBOURS": _NEIGHBOURS,
        "PAIRS": tile.pairs,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
    }
    strides = (inputs.stride(0), *weight.stride())
    _multiply[grid](
        inputs, weight, bias, output, sorting.order, sorting.offsets, tiles, columns, depth, *strides, **constants,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return output


@triton.jit
def find_tile(offsets, number, EXPERTS: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr):
    """The expert of tile `number`, its first place, and the end of the expert's; `EXPERTS` if it is not needed."""
    each = tl.arange(0, WIDE)
    begins = tl.load(offsets + each, mask=each < EXPERTS, other=0)
    ends = tl.load(offsets + each + 1, mask=each < EXPERTS, other=0)
    tiles = (ends - begins + PAIRS - 1) // PAIRS
    tile_ends = tl.cumsum(tiles, 0)
    # The ranges behind EXPERTS end where the last one does: no tile is before their ends and not before its.
    expert = tl.minimum(tl.sum((tile_ends <= number).to(tl.int32), 0), EXPERTS)
    own = each == expert
    within = number - tl.sum(tl.where(own, tile_ends - tiles, 0), 0)
    place = tl.sum(tl.where(own, begins, 0), 0) + within * PAIRS
    return expert, place, tl.sum(tl.where(own, ends, 0), 0)


@triton.jit
def _multiply(
    inputs, weight, bias, output, order, offsets, tiles, columns, depth,
    input_row, weight_expert, weight_column, weight_depth,
    EXPERTS: tl.constexpr, WIDE: tl.constexpr, TOP_K: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, NEIGHBOURS: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile, [COLUMNS, PAIRS]. `TOP_K` is 0 if `inputs` has a row a pair."""
    # Programs start in the order of their numbers: NEIGHBOURS tiles of pairs take the same columns, then the next.
    across = tl.cdiv(columns, COLUMNS)
    group = tl.program_id(0) // (NEIGHBOURS * across)
    beside = tl.minimum(tiles - group * NEIGHBOURS, NEIGHBOURS)
    rest = tl.program_id(0) % (NEIGHBOURS * across)
    expert, first, end = find_tile(offsets, group * NEIGHBOURS + rest % beside, EXPERTS, WIDE, PAIRS)
    if expert < EXPERTS:
        column = rest // beside * COLUMNS + tl.arange(0, COLUMNS)
        place = first + tl.arange(0, PAIRS)
        there = place < end
        inside = column < columns
        each = tl.arange(0, DEPTH)
        row = place
        if TOP_K > 0:
            row = tl.load(order + place, mask=there, other=0) // TOP_K
        inputs_at = inputs + row.to(tl.int64)[None, :] * input_row + each[:, None]
        weights_at = weight + expert.to(tl.int64) * weight_expert
        weights_at += column.to(tl.int64)[:, None] * weight_column + each[None, :] * weight_depth
        sums = tl.zeros([COLUMNS, PAIRS], tl.float32)
        for begin in range(0, depth, DEPTH):
            if EVEN:
                weights = tl.load(weights_at, mask=inside[:, None], other=0.0)
                block = tl.load(inputs_at, mask=there[None, :], other=0.0)
            else:
                deep = each < depth - begin
                weights = tl.load(weights_at, mask=inside[:, None] & deep[None, :], other=0.0)
                block = tl.load(inputs_at, mask=deep[:, None] & there[None, :], other=0.0)
            sums = tl.dot(weights, block, sums, input_precision=PRECISION)
            weights_at += DEPTH * weight_depth
            inputs_at += DEPTH
        if BIAS:
            biases = tl.load(bias + expert * columns + column, mask=inside, other=0.0)
            sums += biases.to(tl.float32)[:, None]
        to = output + place.to(tl.int64)[None, :] * columns + column[:, None]
        tl.store(to, sums.to(output.dtype.element_ty), mask=inside[:, None] & there[None, :])
