"""The random numbers of sampling, in plain Python, one at a time: what `generation.random_numbers` is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

_WORD = 2**32


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 as its authors define it: two products, halves crossed over, the key raised each round."""
    left, right = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * left[0], _WORD)
        high1, low1 = divmod(0xCD9E8D57 * left[2], _WORD)
        left = [high1 ^ left[1] ^ right[0], low1, high0 ^ left[3] ^ right[1], low0]
        right = [(right[0] + 0x9E3779B9) % _WORD, (right[1] + 0xBB67AE85) % _WORD]
    return left


def find_word(seed: int, step: int, token: int) -> int:
    """The word of a token: of each 4,096 the first 1,024 have the first words of their counters, and so on."""
    block, place = divmod(token, 4096)
    word, lane = divmod(place, 1024)
    return philox((block * 1024 + lane, 0, step, 0), (seed % _WORD, seed // _WORD))[word]


def find_gumbel(seed: int, step: int, token: int) -> float:
    """The number that is added to the token's scaled logit; `seed` is from 0 to 2**64 - 1."""
    return -math.log(-math.log1p(-(find_word(seed, step, token) + 0.5) / _WORD))
