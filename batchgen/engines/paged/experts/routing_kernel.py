"""Sorting pairs by expert on a GPU, in Triton: the same function as `routing.sort_in_torch`.

One launch, where torch's sort, count, sum and scatter are a dozen. One program an expert counts the pairs of experts
before its own, and then gives places to its own, in the order of their tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_FEW, _MANY = 1024, 4096  # pairs that a program looks at at once


def sort_by_expert(top_k_index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `routing.sort_by_expert`."""
    numbers = top_k_index.reshape(-1)
    pairs = len(numbers)
    order = torch.empty(pairs, dtype=torch.int32, device=numbers.device)
    inverse = torch.empty_like(order)
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=numbers.device)
    block = _FEW if pairs <= _FEW else _MANY
    # The last program has the pairs of no expert; where they begin is the end of the last expert's.
    _sort[(experts + 1,)](numbers, order, inverse, offsets, pairs, EXPERTS=experts, BLOCK=block, num_warps=block // 256)
    return order, inverse, offsets


@triton.jit
def _sort(numbers, order, inverse, offsets, pairs, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """The pairs of one expert."""
    expert = tl.program_id(0)
    each = tl.arange(0, BLOCK)
    smaller = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, pairs, BLOCK):
        number = tl.load(numbers + begin + each, mask=begin + each < pairs, other=EXPERTS)
        smaller += (number < expert).to(tl.int32)
    place = tl.sum(smaller, 0)
    tl.store(offsets + expert, place)
    for begin in range(0, pairs, BLOCK):
        pair = begin + each
        number = tl.load(numbers + pair, mask=pair < pairs, other=EXPERTS)
        own = (tl.minimum(number, EXPERTS) == expert) & (pair < pairs)
        rank = tl.cumsum(own.to(tl.int32), 0)
        to = place + rank - 1
        tl.store(order + to, pair, mask=own)
        tl.store(inverse + pair, to, mask=own)
        place += tl.sum(own.to(tl.int32), 0)
