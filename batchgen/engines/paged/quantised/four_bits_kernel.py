"""Products of 16-bit inputs and weights of 4 bits on a GPU, in Triton: of a linear layer, or of experts.

A program computes a tile: some rows of the weight, and some tokens (or pairs of one expert, as in
`experts.grouped_gemm_kernel`). It makes 16 bits of the weights in registers (`parts`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from batchgen.engines.paged.experts.grouped_gemm import Sorting
from batchgen.engines.paged.quantised.packed import Packed
from batchgen.engines.paged.quantised.packing import BLOCK, PART
from batchgen.engines.paged.quantised.parts import count_groups, find_group, load_scales, load_words, multiply_half
from batchgen.engines.paged.quantised.programs import find_program, get_counters, has_sm_90, join_splits, plan_launch


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


# The best of `benchmarks/quantised.py tiles llama-8b` on an H200, by the sum over its layers.
TILES = (
    (16, Tile(16, 128, 4, 3, 264)),
    (32, Tile(32, 64, 4, 4, 528)),
    (64, Tile(64, 64, 4, 3, 264)),
)
LARGEST = Tile(64, 64, 4, 3)


def choose_tile(tokens: int, experts: int = 1) -> Tile:
    """The tile for so many tokens, or pairs of so many experts."""
    return next((tile for most, tile in TILES if tokens <= most * experts), LARGEST)


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
        assembly: whether nibbles are widened by instructions of the GPU; None: if it has them.

    Returns:
        [tokens, rows], or [pairs, rows], sorted; rows of pairs without an expert are not written.
    """
    values = weight.values if sorting else weight.values[None]
    (experts, blocks, rows, _), columns = values.shape, inputs.shape[1]
    tokens = len(sorting.order) if sorting else len(inputs)
    output = torch.empty((tokens, rows), dtype=inputs.dtype, device=inputs.device)
    if tokens == 0:
        return output
    inputs = inputs if inputs.stride(1) == 1 else inputs.contiguous()
    tile = tile or choose_tile(tokens, experts)
    launch = plan_launch(output, blocks, experts, sorting, tile)
    groups = weight.scales.shape[-2]
    group, scale = find_group(weight, columns), tile.scale_weights
    assembly = has_sm_90(inputs.device) if assembly is None else assembly
    if weight.form == "mxfp4":  # by the multiplication that makes them 16 bits
        scale = assembly and inputs.dtype == torch.bfloat16
    constants = launch.constants | {
        "KIND": weight.form, "BIAS": bias is not None, "ZEROS": weight.zeros is not None, "GROUP": group,
        "GROUPS": count_groups(group), "EVEN": columns % BLOCK == 0, "SCALE": scale, "PART": PART,
        "ASSEMBLY": assembly,
    }  # fmt: skip
    _multiply[launch.grid](
        inputs, values, weight.scales, weight.zeros, bias, output, launch.sums, get_counters(inputs.device),
        *launch.pairs, launch.tiles, tokens, rows, columns, blocks, groups, inputs.stride(0), **constants,
        **tile.settings,
    )  # fmt: skip
    return output


@triton.jit(do_not_specialize=["tiles", "tokens", "blocks", "groups"])
def _multiply(
    inputs, values, scales, zeros, bias, output, sums_of_splits, counters, order, offsets,
    tiles, tokens, rows, columns, blocks, groups, input_row,
    KIND: tl.constexpr, GROUPED: tl.constexpr, EXPERTS: tl.constexpr, WIDE: tl.constexpr, TOP_K: tl.constexpr,
    BIAS: tl.constexpr, ZEROS: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    PART: tl.constexpr, EVEN: tl.constexpr, SCALE: tl.constexpr, ONCE: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, NEIGHBOURS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """One tile, [ROWS, TOKENS]. `TOP_K` is 0 if `inputs` has a row a pair."""
    DTYPE: tl.constexpr = inputs.dtype.element_ty
    expert, first, end, first_row = find_program(
        offsets, tiles, tokens, rows, GROUPED, EXPERTS, WIDE, TOKENS, ROWS, NEIGHBOURS
    )
    if expert < EXPERTS:
        row = first_row + tl.arange(0, ROWS)
        inside = row < rows
        place = first + tl.arange(0, TOKENS)
        there = place < end
        each = tl.arange(0, PART)
        token = place
        if TOP_K > 0:
            token = tl.load(order + place, mask=there, other=0) // TOP_K
        inputs_at = inputs + token.to(tl.int64)[None, :] * input_row + each[:, None]
        values_at = values + expert.to(tl.int64) * blocks * rows * PART + row[:, None] * PART + each[None, :]
        scales_at = expert.to(tl.int64) * groups * rows + row
        share = tl.cdiv(blocks, tl.num_programs(1))
        begin = tl.program_id(1) * share
        sums = tl.zeros([ROWS, TOKENS], tl.float32)
        # The scales of a block are read one block ahead: the compiler does so for what it gives to matrix units alone.
        low_scales, high_scales = load_scales(scales, scales_at, begin, rows, groups, inside, KIND, GROUP, GROUPS, PART)
        for block in range(begin, tl.minimum(begin + share, blocks)):
            words = load_words(values_at + tl.cast(block, tl.int64) * rows * PART, inside, ONCE)
            column = block * 8 * PART
            next_low_scales, next_high_scales = low_scales, high_scales
            if not SCALE:
                next_low_scales, next_high_scales = load_scales(
                    scales, scales_at, block + 1, rows, groups, inside, KIND, GROUP, GROUPS, PART
                )
            sums = multiply_half(
                sums, words, low_scales, scales, zeros, inputs_at, scales_at, column, columns, rows, groups, inside,
                each, there, 0, KIND, ZEROS, GROUP, GROUPS, PART, EVEN, SCALE, DTYPE, ASSEMBLY,
            )  # fmt: skip
            sums = multiply_half(
                sums, words, high_scales, scales, zeros, inputs_at, scales_at, column + 4 * PART, columns, rows,
                groups, inside, each, there, 1, KIND, ZEROS, GROUP, GROUPS, PART, EVEN, SCALE, DTYPE, ASSEMBLY,
            )  # fmt: skip
            low_scales, high_scales = next_low_scales, next_high_scales
        mask = inside[:, None] & there[None, :]
        to = place.to(tl.int64)[None, :] * rows + row[:, None]
        is_last = True
        if SPLIT:
            sums, is_last = join_splits(sums, sums_of_splits, counters, to, mask, tokens * rows)
        if is_last:
            if BIAS:
                sums += tl.load(bias + expert * rows + row, mask=inside, other=0.0).to(tl.float32)[:, None]
            tl.store(output + to, sums.to(DTYPE), mask=mask)
