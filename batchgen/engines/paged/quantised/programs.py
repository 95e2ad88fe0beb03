"""What programs of `four_bits_kernel` and `eight_bits_kernel` have in common: which tile each computes, and its end.

A product of few tokens splits its columns among several programs, so that enough bytes are on their way; the last to
end adds up the sums of all, in their order.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, Protocol

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


class Tile(Protocol):
    """What one program computes."""

    @property
    def tokens(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def programs(self) -> int:
        """That columns are split for, if tokens are one tile; 0: never split."""


class Launch(NamedTuple):
    """How a product is divided among programs."""

    grid: tuple[int, int]  # tiles, and programs that split the columns of one
    tiles: int  # of tokens
    sums: torch.Tensor  # of those that split columns, [programs, tokens, rows], float32; else the output
    pairs: tuple[torch.Tensor, torch.Tensor]  # a sorting's order and offsets; without one anything
    constants: dict[str, Any]  # that kernels have in common


def plan_launch(output: torch.Tensor, blocks: int, experts: int, sorting: Sorting | None, tile: Tile) -> Launch:
    """Divides the product that makes `output` [tokens or pairs, rows] of so many blocks of columns."""
    tokens, rows = output.shape
    tiles = count_tiles(tokens, experts, tile.tokens) if sorting else triton.cdiv(tokens, tile.tokens)
    across, splits = triton.cdiv(rows, tile.rows), 1
    if not sorting and tiles == 1:
        share = -(-blocks // max(1, min(blocks, tile.programs // across, _MOST_SPLITS)))
        splits = -(-blocks // share)
    sums = output.new_empty((splits, tokens, rows), dtype=torch.float32) if splits > 1 else output
    constants = {
        "GROUPED": sorting is not None, "EXPERTS": experts, "WIDE": max(2, triton.next_power_of_2(experts)),
        "TOP_K": sorting.top_k if sorting else 0, "SPLIT": splits > 1, "ONCE": tiles == 1, "ROWS": tile.rows,
        "TOKENS": tile.tokens, "NEIGHBOURS": NEIGHBOURS,
    }  # fmt: skip
    pairs = (sorting.order, sorting.offsets) if sorting else (output, output)
    return Launch((tiles * across, splits), tiles, sums, pairs, constants)


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
