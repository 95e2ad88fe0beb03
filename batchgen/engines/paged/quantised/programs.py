"""What programs of `four_bits_kernel` and `eight_bits_kernel` have in common: which tile each computes, and its end.

A product of few tokens splits its columns among several programs, so that enough bytes are on their way; the last to
end adds up the sums of all, in their order.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from batchgen.engines.paged.experts.grouped_gemm import Sorting
from batchgen.engines.paged.experts.grouped_gemm_kernel import count_tiles, find_tile

NEIGHBOURS = 8
"""Tiles of tokens that go through the rows together, and share the weights that are in the cache."""

_MOST_SPLITS = 32
_counters: dict[torch.device, torch.Tensor] = {}


def prepare(device: torch.device) -> None:
    """Makes what products on `device` share, once, ahead of the first capture of a graph."""
    if device not in _counters:
        _counters[device] = torch.zeros(1 << 16, dtype=torch.int32, device=device)


def get_counters(device: torch.device) -> torch.Tensor:
    """Returns zeros, in which programs of a product count how many of them have ended; they leave zeros."""
    prepare(device)
    return _counters[device]


@cache
def has_sm_90(device: torch.device) -> bool:
    """Whether it is a GPU with the instructions of compute capability 9.0: products of 8-bit floats with scales by row,
    and differences of two numbers in bfloat16 at once."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def count_programs(
    sizes: tuple[int, int, int], experts: int, sorting: Sorting | None, tile: tuple[int, int], wanted: int
) -> tuple[int, int, int]:
    """Returns how many tiles there are of tokens and of rows, and for how many programs columns are split.

    Args:
        sizes: tokens or pairs, rows, and blocks of columns.
        tile: its tokens and rows.
        wanted: programs, if tokens are one tile.
    """
    tokens, rows, blocks = sizes
    tiles = count_tiles(tokens, experts, tile[0]) if sorting else triton.cdiv(tokens, tile[0])
    across = triton.cdiv(rows, tile[1])
    if sorting or tiles > 1:
        return tiles, across, 1
    share = -(-blocks // max(1, min(blocks, wanted // across, _MOST_SPLITS)))
    return tiles, across, -(-blocks // share)


@triton.jit
def find_program(
    offsets, tiles, tokens, rows,
    GROUPED: tl.constexpr, EXPERTS: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """The expert of this program, or EXPERTS if there is nothing to do; its first token or pair, the end of all that it
    may take, and its first row."""
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
    return expert, first, end, rest // beside * ROWS


@triton.jit
def join_splits(sums, sums_of_splits, counters, to, mask, size):
    """Keeps this program's sums; the last one of those that split the columns gets all of them, and True."""
    splits = tl.num_programs(1)
    tl.store(sums_of_splits + tl.program_id(1).to(tl.int64) * size + to, sums, mask=mask)
    tl.debug_barrier()
    is_last = tl.atomic_add(counters + tl.program_id(0), 1) == splits - 1
    if is_last:
        tl.debug_barrier()
        sums = tl.zeros(sums.shape, tl.float32)
        for split in range(splits):
            other = sums_of_splits + tl.cast(split, tl.int64) * size
            sums += tl.load(other + to, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(counters + tl.program_id(0), 0)
    return sums, is_last
