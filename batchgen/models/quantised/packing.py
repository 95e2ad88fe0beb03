"""Numbers of 4 bits in words, as checkpoints have them, and in bytes of two, as `QuantisedWeight` has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from batchgen.models.quantised.weight import QuantisedWeight

_IN_ORDER = tuple(range(8))


def unpack_words(words: torch.Tensor, order: Sequence[int] = _IN_ORDER) -> torch.Tensor:
    """Returns the eight numbers of each word side by side.

    Args:
        words: int32 [rows, words], eight numbers each, the first in the lowest bits.
        order: of the eight, the place that the number in bits 4i to 4i+3 belongs to.

    Returns:
        uint8 [rows, 8 * words], from 0 to 15.
    """
    unpacked = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for place, column in enumerate(order):
        unpacked[..., column] = (words >> (4 * place)) & 15
    return unpacked.flatten(-2)


def pack_pairs(numbers: torch.Tensor) -> torch.Tensor:
    """Returns bytes that hold two adjacent columns each, the even one in the low half.

    Args:
        numbers: uint8 […, columns], from 0 to 15; an even number of columns.
    """
    return numbers[..., ::2] | (numbers[..., 1::2] << 4)


def view_words_as_pairs(words: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns a view, uint8 [rows, columns / 2], of words whose eight numbers are eight columns, the first lowest.

    A word lies in memory with its lowest byte first, so that these are the bytes that `pack_pairs` makes.
    """
    return words.contiguous().view(torch.uint8)[..., : columns // 2]


def make_groups_even(weight: QuantisedWeight, group: int) -> QuantisedWeight:
    """Returns `weight`, whose scales are of `group` columns each and of fewer at the end, with groups of one size."""
    columns = weight.shape[-1]
    if weight.scales.shape[-1] == 1 or columns % group == 0:
        return weight
    return split_groups(weight, group, math.gcd(columns, group))


def split_groups(weight: QuantisedWeight, group: int, size: int) -> QuantisedWeight:
    """Returns the same numbers with scales of `size` columns each, where they were of `group`, a multiple of it."""
    groups = weight.shape[-1] // size

    def spread(of_groups: torch.Tensor) -> torch.Tensor:
        if of_groups.shape[-1] == 1:
            return of_groups
        return of_groups.repeat_interleave(group // size, -1)[..., :groups].contiguous()

    zeros = None if weight.zeros is None else spread(weight.zeros)
    return replace(weight, scales=spread(weight.scales), zeros=zeros)
