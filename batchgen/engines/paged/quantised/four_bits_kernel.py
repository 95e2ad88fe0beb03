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
from batchgen.engines.paged.experts.grouped_gemm_kernel import count_tiles, find_tile
from batchgen.engines.paged.quantised.nibbles import prepare_zeros, widen_e2m1, widen_int4
from batchgen.engines.paged.quantised.packing import BLOCK, PART, Packed

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
    (16, Tile(16, 128, 4, 4, 528)),
    (32, Tile(32, 64, 4, 4, 528)),
    (64, Tile(64, 128, 8, 4, 264)),
)
LARGEST = Tile(64, 128, 8, 4)
_counters: dict[torch.device, torch.Tensor] = {}


def choose_tile(tokens: int, experts: int = 1) -> Tile:
    """The tile for so many tokens, or pairs of so many experts."""
    return next((tile for most, tile in TILES if tokens <= most * experts), LARGEST)


def prepare(device: torch.device) -> None:
    """Makes what products on `device` share, once, ahead of the first capture of a graph."""
    if device not in _counters:
        _counters[device] = torch.zeros(1 << 16, dtype=torch.int32, device=device)


def get_counters(device: torch.device) -> torch.Tensor:
    """Returns zeros, in which programs of a product count how many of them have ended; they leave zeros."""
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
    (experts, blocks, rows, _), columns = values.shape, inputs.shape[1]
    tokens = len(sorting.order) if sorting else len(inputs)
    output = torch.empty((tokens, rows), dtype=inputs.dtype, device=inputs.device)
    if tokens == 0:
        return output
    inputs = inputs if inputs.stride(1) == 1 else inputs.contiguous()
    tile = tile or choose_tile(tokens, experts)
    tiles = count_tiles(tokens, experts, tile.tokens) if sorting else triton.cdiv(tokens, tile.tokens)
    across = triton.cdiv(rows, tile.rows)
    splits = 1 if sorting or tiles > 1 else max(1, min(blocks, tile.programs // across, 32))
    groups = weight.scales.shape[-2]
    group = -(-columns // groups) if groups > 1 else 1 << 30
    sums = torch.empty((splits, tokens, rows), dtype=torch.float32, device=inputs.device) if splits > 1 else output
    constants: dict[str, Any] = {
        "KIND": weight.form, "GROUPED": sorting is not None, "EXPERTS": experts,
        "WIDE": max(2, triton.next_power_of_2(experts)), "TOP_K": sorting.top_k if sorting else 0,
        "BIAS": bias is not None, "ZEROS": weight.zeros is not None, "SPLIT": splits > 1, "GROUP": group,
        "GROUPS": count_groups(group), "EVEN": columns % BLOCK == 0, "SCALE": tile.scale_weights, "PART": PART,
        "ONCE": tiles == 1, "ROWS": tile.rows, "TOKENS": tile.tokens, "NEIGHBOURS": _NEIGHBOURS,
        "ASSEMBLY": inputs.device.type == "cuda" if assembly is None else assembly,
    }  # fmt: skip
    of_pairs = (sorting.order, sorting.offsets) if sorting else (output, output)
    _multiply[(tiles * across, splits)](
        inputs, values, weight.scales, weight.zeros, bias, output, sums, get_counters(inputs.device), *of_pairs,
        tiles, tokens, rows, columns, blocks, groups, inputs.stride(0), **constants, **tile.settings,
    )  # fmt: skip
    return output


def count_groups(group: int) -> int:
    """Returns how many scales a row has in a block; as many as parts, if groups do not end with blocks."""
    if group % BLOCK == 0:
        return 1
    return BLOCK // (group if BLOCK % group == 0 else PART)


@triton.jit
def _find_group(at, column, rows, groups, GROUP: tl.constexpr):
    """Where the scales and zeros of some rows are, for a column; behind the last one, those of the last."""
    return at + tl.minimum(column // GROUP, groups - 1) * rows


@triton.jit
def _load_scales(scales, at, inside, KIND: tl.constexpr):
    """In float32."""
    found = tl.load(scales + at, mask=inside, other=0)
    if KIND == "mxfp4":
        found = (found.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return found.to(tl.float32)


@triton.jit
def load_four_scales(
    scales, at, column, rows, groups, inside,
    KIND: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Those of four parts of a block, from `column` on; which are the same is known from GROUPS, those of a block."""
    first = _load_scales(scales, _find_group(at, column, rows, groups, GROUP), inside, KIND)
    second, third, fourth = first, first, first
    if GROUPS >= 4:
        third = _load_scales(scales, _find_group(at, column + 2 * PART, rows, groups, GROUP), inside, KIND)
        fourth = third
    if GROUPS == 8:
        second = _load_scales(scales, _find_group(at, column + PART, rows, groups, GROUP), inside, KIND)
        fourth = _load_scales(scales, _find_group(at, column + 3 * PART, rows, groups, GROUP), inside, KIND)
    return first, second, third, fourth


@triton.jit
def _load_four_zeros(
    zeros, at, column, rows, groups, inside, GROUP: tl.constexpr, GROUPS: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """As `load_four_scales`."""
    first = tl.load(zeros + _find_group(at, column, rows, groups, GROUP), mask=inside, other=0)
    second, third, fourth = first, first, first
    if GROUPS >= 4:
        third = tl.load(zeros + _find_group(at, column + 2 * PART, rows, groups, GROUP), mask=inside, other=0)
        fourth = third
    if GROUPS == 8:
        second = tl.load(zeros + _find_group(at, column + PART, rows, groups, GROUP), mask=inside, other=0)
        fourth = tl.load(zeros + _find_group(at, column + 3 * PART, rows, groups, GROUP), mask=inside, other=0)
    return first, second, third, fourth


@triton.jit
def widen(
    words, zeros, at, column, rows, groups, inside,
    KIND: tl.constexpr, ZEROS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PART: tl.constexpr,
    HALF: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Four of the eight parts of a block, from `column` on, less their zeros."""
    if KIND == "mxfp4":
        a, b, c, d = widen_e2m1(words, HALF, DTYPE, ASSEMBLY)
    else:
        if ZEROS:
            first, second, third, fourth = _load_four_zeros(
                zeros, at, column, rows, groups, inside, GROUP, GROUPS, PART
            )
        else:
            first = tl.full(at.shape, 8, tl.int32)
            second, third, fourth = first, first, first
        first = prepare_zeros(first, DTYPE, ASSEMBLY)
        second = prepare_zeros(second, DTYPE, ASSEMBLY)
        third = prepare_zeros(third, DTYPE, ASSEMBLY)
        fourth = prepare_zeros(fourth, DTYPE, ASSEMBLY)
        a, b, c, d = widen_int4(words, (first, second, third, fourth), HALF, DTYPE, ASSEMBLY)
    return a, b, c, d


@triton.jit
def _load_part(at, column, columns, each, there, EVEN: tl.constexpr):
    """The inputs of a part, [PART, TOKENS]."""
    if EVEN:
        part = tl.load(at + column, mask=there[None, :], other=0.0)
    else:
        part = tl.load(at + column, mask=there[None, :] & (each < columns - column)[:, None], other=0.0)
    return part


@triton.jit
def _load_half(at, column, columns, each, there, EVEN: tl.constexpr, PART: tl.constexpr):
    """Those of four parts."""
    first = _load_part(at, column, columns, each, there, EVEN)
    second = _load_part(at, column + PART, columns, each, there, EVEN)
    third = _load_part(at, column + 2 * PART, columns, each, there, EVEN)
    fourth = _load_part(at, column + 3 * PART, columns, each, there, EVEN)
    return first, second, third, fourth


@triton.jit
def _add_half(sums, numbers, inputs, scales, GROUPS: tl.constexpr, SCALE: tl.constexpr):
    """`sums` and the products of four parts of a block, [ROWS, TOKENS]."""
    a, b, c, d = numbers
    first, second, third, fourth = inputs
    scale_a, scale_b, scale_c, scale_d = scales
    if SCALE:
        sums = tl.dot((a.to(tl.float32) * scale_a[:, None]).to(a.dtype), first, sums)
        sums = tl.dot((b.to(tl.float32) * scale_b[:, None]).to(a.dtype), second, sums)
        sums = tl.dot((c.to(tl.float32) * scale_c[:, None]).to(a.dtype), third, sums)
        sums = tl.dot((d.to(tl.float32) * scale_d[:, None]).to(a.dtype), fourth, sums)
    elif GROUPS <= 2:
        part = tl.dot(d, fourth, tl.dot(c, third, tl.dot(b, second, tl.dot(a, first))))
        sums += part * scale_a[:, None]
    elif GROUPS == 4:
        sums += tl.dot(b, second, tl.dot(a, first)) * scale_a[:, None]
        sums += tl.dot(d, fourth, tl.dot(c, third)) * scale_c[:, None]
    else:
        sums += tl.dot(a, first) * scale_a[:, None]
        sums += tl.dot(b, second) * scale_b[:, None]
        sums += tl.dot(c, third) * scale_c[:, None]
        sums += tl.dot(d, fourth) * scale_d[:, None]
    return sums


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
        each = tl.arange(0, PART)
        token = place
        if TOP_K > 0:
            token = tl.load(order + place, mask=there, other=0) // TOP_K
        inputs_at = inputs + token.to(tl.int64)[None, :] * input_row + each[:, None]
        values_at = values + expert.to(tl.int64) * blocks * rows * PART + row[:, None] * PART + each[None, :]
        scales_at = expert.to(tl.int64) * groups * rows + row
        splits = tl.num_programs(1)
        share = tl.cdiv(blocks, splits)
        begin = tl.program_id(1) * share
        sums = tl.zeros([ROWS, TOKENS], tl.float32)
        # The scales of a block are read one block ahead: the compiler does so for what it gives to matrix units alone.
        column = begin * 8 * PART
        low_scales = load_four_scales(scales, scales_at, column, rows, groups, inside, KIND, GROUP, GROUPS, PART)
        high_scales = load_four_scales(
            scales, scales_at, column + 4 * PART, rows, groups, inside, KIND, GROUP, GROUPS, PART
        )
        for block in range(begin, tl.minimum(begin + share, blocks)):
            at = values_at + tl.cast(block, tl.int64) * rows * PART
            if ONCE:
                words = tl.load(at, mask=inside[:, None], other=0, eviction_policy="evict_first")
            else:
                words = tl.load(at, mask=inside[:, None], other=0)
            column = block * 8 * PART
            next_low_scales, next_high_scales = low_scales, high_scales
            if SCALE:  # numbers are scaled where matrix units want them, which is not where a value of before is
                low_scales = load_four_scales(
                    scales, scales_at, column, rows, groups, inside, KIND, GROUP, GROUPS, PART
                )
                high_scales = load_four_scales(
                    scales, scales_at, column + 4 * PART, rows, groups, inside, KIND, GROUP, GROUPS, PART
                )
            else:
                next_low_scales = load_four_scales(
                    scales, scales_at, column + 8 * PART, rows, groups, inside, KIND, GROUP, GROUPS, PART
                )
                next_high_scales = load_four_scales(
                    scales, scales_at, column + 12 * PART, rows, groups, inside, KIND, GROUP, GROUPS, PART
                )
            parts = _load_half(inputs_at, column, columns, each, there, EVEN, PART)
            numbers = widen(
                words, zeros, scales_at, column, rows, groups, inside,
                KIND, ZEROS, GROUP, GROUPS, PART, 0, DTYPE, ASSEMBLY,
            )  # fmt: skip
            sums = _add_half(sums, numbers, parts, low_scales, GROUPS, SCALE)
            column += 4 * PART
            parts = _load_half(inputs_at, column, columns, each, there, EVEN, PART)
            numbers = widen(
                words, zeros, scales_at, column, rows, groups, inside,
                KIND, ZEROS, GROUP, GROUPS, PART, 1, DTYPE, ASSEMBLY,
            )  # fmt: skip
            sums = _add_half(sums, numbers, parts, high_scales, GROUPS, SCALE)
            low_scales, high_scales = next_low_scales, next_high_scales
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
