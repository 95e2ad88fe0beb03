"""What a step needs on the device, side by side in one tensor, so that one copy brings it there."""

from __future__ import annotations

from typing import NamedTuple

import torch

_ALIGN = 16  # numbers: kernels are compiled for addresses that are multiples of 16 bytes, and again for others


class Arrays(NamedTuple):
    """Views of a tensor of int32, which lie elsewhere for every number of tokens."""

    slots: torch.Tensor  # [tokens], of their sequences
    positions: torch.Tensor  # [tokens]; below 0: padding
    ids: torch.Tensor  # [tokens]; below 0: the token that was chosen last for its slot
    decoding: torch.Tensor  # [1], how many tokens decode

    @staticmethod
    def length(tokens: int) -> int:
        """Of the tensor, for so many tokens or fewer."""
        return 3 * _apart(tokens) + 1

    @staticmethod
    def of(tensor: torch.Tensor, tokens: int) -> Arrays:
        """Those of a step of so many tokens."""
        apart = _apart(tokens)
        slots, positions, ids = (tensor[row * apart : row * apart + tokens] for row in range(3))
        return Arrays(slots, positions, ids, tensor[3 * apart : 3 * apart + 1])


def _apart(tokens: int) -> int:
    return -(-tokens // _ALIGN) * _ALIGN
