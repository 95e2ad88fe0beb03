"""Products of 16-bit inputs and weights of 4 bits on a GPU, in Triton: of a linear layer, or of experts.

A program computes a tile: some rows of the weight, and some tokens (or pairs of one expert, as in
`experts.grouped_gemm_kernel`). It makes 16 bits of the weights in registers. Of few tokens, the columns are split
among several programs, so that enough bytes are on their way; the last to end adds up the sums of all, in their order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from batchgen.engines.paged.experts.grouped_gemm import Sorting
from batchgen.engines.paged.experts.grouped_gemm_kernel import find_tile, count_tiles
from batchgen.engines.paged.quantised.nibbles import widen_e2m1, widen_int4
from batchgen.engines.paged.quantised.packing import Packed

_NEIGHBOURS = 8  # tiles of tokens that go through the rows together, and share the weights that are in the cache


class Tile(NamedTuple):
    """What one program computes, and how."""

    tokens: int
    rows: int
    warps: int
    stages: int  # blocks of columns under way at once
    programs: int = 0  # that columns are split for, if tokens are one tile; 0: never split
    scale_weights: bool = False  # before the product, rather than its sums

    @property
    def settings(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


TILES = (
    (16, Tile(16, 64, 4, 4, 528)),
    (32, Tile(32, 64, 4, 4, 528)),
    (64, Tile(64, 128, 4, 4, 264)),
)
LARGEST = Tile(128, 128, 8, 4, 0, True)
_counters: dict[torch.device, torch.Tensor] = {}


def choose_tile(tokens: int, experts: int = 1) -> Tile:
    """The tile for so many tokens, or pairs of so many experts."""
    return next((tile for most, tile in TILES if tokens <= most * experts), LARGEST)


def prepare(device: torch.device) -> None:
    """Makes what products on `device` share, once, ahead of the first capture of a graph."""
    if device not in _counters:
        _counters[device] = torch.zeros(1 << 16, dtype=torch.int32, device=device)


def get_counters(device: torch.device) -> torch.Tensor:
    """Returns zeros, in which programs of a product count how many of them have ended, and which they leave as zeros."""
    prepare(device)
    return _counters[device]


def multiply(
    inputs: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    sorting: Sorting | None = None,
    tile: Tile | None = None,
    assembly: bool | None = None,
) -> torch.Tensor:
    """Multiplies inputs [tokens, columns] by a weight; with `sorting`, the row of each pair by its expert's.

    Args:
        weight: of 4 bits, packed; of experts, if there is a `sorting`.
        bias: [rows], or [experts, rows].
        tile: chosen by shape unless it is given.
        assembly: whether nibbles are widened by instructions of the GPU; None: unless the kernel is interpreted.

    Returns:
        [tokens, rows], or [pairs, rows], sorted; rows of pairs without an expert are not written.
    """
    values = weight.values if sorting else weight.values[None]
    (experts, blocks, rows, half), columns = values.shape, inputs.shape[1]
    tokens = len(sorting.order) if sorting else len(inputs)
    output = torch.empty((tokens, rows), dtype=inputs.dtype, device=inputs.device)
    if tokens == 0:
        return output
    inputs = inputs if inputs.stride(1) == 1 else inputs.contiguous()
    tile = tile or choose_tile(tokens, experts)
    tiles = count_tiles(tokens, experts, tile.tokens) if sorting else triton.cdiv(tokens, tile.tokens)
    across = triton.cdiv(rows, tile.rows)
    splits = 1 if sorting or tiles > 1 else max(1, min(blocks // 2, tile.programs // across, 32))
    groups = weight.scales.shape[-2]
    group = -(-columns // groups) if groups > 1 else 1 << 30
    sums = torch.empty((splits, tokens, rows), dtype=torch.float32, device=inputs.device) if splits > 1 else output
    constants: dict[str, Any] = {
        "KIND": weight.form, "GROUPED": sorting is not None, "EXPERTS": experts,
        "WIDE": max(2, triton.next_power_of_2(experts)), "TOP_K": sorting.top_k if sorting else 0,
        "BIAS": bias is not None, "ZEROS": weight.zeros is not None, "SPLIT": splits > 1, "GROUP": group, "HALF": half,
        "SAME": group % (2 * half) == 0, "EVEN": blocks * 2 * half == columns, "SCALE": tile.scale_weights,
        "ONCE": tiles == 1, "ROWS": tile.rows, "TOKENS": tile.tokens, "NEIGHBOURS": _NEIGHBOURS,
        "ASSEMBLY": inputs.device.type == "cuda" if assembly is None else assembly,
    }  # fmt: skip
    of_pairs = (sorting.order, sorting.offsets) if sorting else (output, output)
    _multiply[(tiles * across, splits)](
        inputs, values, weight.scales, weight.zeros, bias, output, sums, get_counters(inputs.device), *of_pairs,
        tiles, tokens, rows, columns, blocks, groups, inputs.stride(0), **constants, **tile.settings,
    )  # fmt: skip
    return output


@triton.jit
def _find_scales(scales, at, inside, KIND: tl.constexpr):
    """The scales of a group of some rows, in float32."""
    found = tl.load(scales + at, mask=inside, other=0)
    if KIND == "mxfp4":
        return (found.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    else:
        return found.to(tl.float32)


@triton.jit
def _multiply(
    inputs, values, scales, zeros, bias, output, sums_of_splits, counters, order, offsets,
    tiles, tokens, rows, columns, blocks, groups, input_row,
    KIND: tl.constexpr, GROUPED: tl.constexpr, EXPERTS: tl.constexpr, WIDE: tl.constexpr, TOP_K: tl.constexpr,
    BIAS: tl.constexpr, ZEROS: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
    SAME: tl.constexpr, EVEN: tl.constexpr, SCALE: tl.constexpr, ONCE: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, NEIGHBOURS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """One tile, [ROWS, TOKENS]. `TOP_K` is 0 if `inputs` has a row a pair."""
    DTYPE: tl.constexpr = inputs.dtype.element_ty
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
        each = tl.arange(0, HALF)
        token = place
        if TOP_K > 0:
            token = tl.load(order + place, mask=there, other=0) // TOP_K
        inputs_at = inputs + token.to(tl.int64)[None, :] * input_row + each[:, None]
        values_at = values + expert.to(tl.int64) * blocks * rows * HALF + row[:, None] * HALF + each[None, :]
        scales_at = expert.to(tl.int64) * groups * rows + row
        splits = tl.num_programs(1)
        share = tl.cdiv(blocks, splits)
        begin = tl.program_id(1) * share
        sums = tl.zeros([ROWS, TOKENS], tl.float32)
        for block in range(begin, tl.minimum(begin + share, blocks)):
            at = values_at + tl.cast(block, tl.int64) * rows * HALF
            if ONCE:
                bytes = tl.load(at, mask=inside[:, None], other=0, eviction_policy="evict_first")
            else:
                bytes = tl.load(at, mask=inside[:, None], other=0)
            column = block * 2 * HALF
            if EVEN:
                low_inputs = tl.load(inputs_at + column, mask=there[None, :], other=0.0)
                high_inputs = tl.load(inputs_at + column + HALF, mask=there[None, :], other=0.0)
            else:
                deep = (each < columns - column)[:, None] & there[None, :]
                low_inputs = tl.load(inputs_at + column, mask=deep, other=0.0)
                deep = (each < columns - column - HALF)[:, None] & there[None, :]
                high_inputs = tl.load(inputs_at + column + HALF, mask=deep, other=0.0)
            low_group = tl.minimum(column // GROUP, groups - 1) * rows
            high_group = low_group if SAME else tl.minimum((column + HALF) // GROUP, groups - 1) * rows
            low_scale = _find_scales(scales, scales_at + low_group, inside, KIND)
            high_scale = low_scale if SAME else _find_scales(scales, scales_at + high_group, inside, KIND)
            if KIND == "mxfp4":
                low, high = widen_e2m1(bytes, DTYPE, ASSEMBLY)
            else:
                if ZEROS:
                    low_zero = tl.load(zeros + scales_at + low_group, mask=inside, other=0).to(tl.float32)
                    high_zero = low_zero
                    if not SAME:
                        high_zero = tl.load(zeros + scales_at + high_group, mask=inside, other=0).to(tl.float32)
                else:
                    low_zero = tl.full([ROWS], 8.0, tl.float32)
                    high_zero = low_zero
                low, high = widen_int4(bytes, low_zero, high_zero, DTYPE, ASSEMBLY)
            if SCALE:
                low = (low.to(tl.float32) * low_scale[:, None]).to(DTYPE)
                high = (high.to(tl.float32) * high_scale[:, None]).to(DTYPE)
                sums = tl.dot(low, low_inputs, sums)
                sums = tl.dot(high, high_inputs, sums)
            elif SAME:
                sums += tl.dot(high, high_inputs, tl.dot(low, low_inputs)) * low_scale[:, None]
            else:
                sums += tl.dot(low, low_inputs) * low_scale[:, None]
                sums += tl.dot(high, high_inputs) * high_scale[:, None]
        mask = inside[:, None] & there[None, :]
        to = place.to(tl.int64)[None, :] * rows + row[:, None]
        last = True
        if SPLIT:
            own = sums_of_splits + tl.program_id(1).to(tl.int64) * tokens * rows
            tl.store(own + to, sums, mask=mask)
            tl.debug_barrier()
            last = tl.atomic_add(counters + tl.program_id(0), 1) == splits - 1
            if last:
                tl.debug_barrier()
                sums = tl.zeros([ROWS, TOKENS], tl.float32)
                for split in range(splits):
                    other = sums_of_splits + tl.cast(split, tl.int64) * tokens * rows
                    sums += tl.load(other + to, mask=mask, other=0.0, cache_modifier=".cg")
                tl.store(counters + tl.program_id(0), 0)
        if last:
            if BIAS:
                biases = tl.load(bias + expert * rows + row, mask=inside, other=0.0)
                sums += biases.to(tl.float32)[:, None]
            tl.store(output + to, sums.to(DTYPE), mask=mask)
