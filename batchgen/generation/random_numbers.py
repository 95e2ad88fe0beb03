"""Random numbers that are computed from their place: those of a row, a step and a token, without any state.

The generator is Philox4x32 with 10 rounds, of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as
1, 2, 3" (SC 2011): it turns a counter of four words of 32 bits and a key of two into four random words. The key is the
seed of the row, and the counter says which step and which tokens the words are for. So a row has the same numbers
wherever it stands and however often it was interrupted, and those of a few tokens cost no more than these tokens.

Words are int64 tensors of values from 0 to 2**32 - 1, as torch has no arithmetic of unsigned numbers.
"""

from __future__ import annotations

import torch

BLOCK, LANES = (
    4096,
    1024,
)  # tokens that are numbered together, and how many of them have the same word of their counters

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Returns the four random words of each counter: Philox4x32-10.

    Args:
        counter: its four words, int64 tensors of shapes that broadcast together.
        key: its two words, the same.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two words needs all 64 bits and wraps around to a negative number; its bits are right.
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # Bits above a word (of the sign, the key and whole products) are cut off once, before the next product.
        c0 = ((product2 >> 32) ^ c1 ^ k0) & _WORD
        c2 = ((product0 >> 32) ^ c3 ^ k1) & _WORD
        c1, c3 = product2, product0
        k0, k1 = k0 + _KEY_STEPS[0], k1 + _KEY_STEPS[1]
    return c0, c1 & _WORD, c2, c3 & _WORD


def find_words(seeds: torch.Tensor, steps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the random word of each token.

    Token `t` has word `(t // 1024) % 4` of counter `(c, 0, step, 0)`, where `c` is `(t // 4096) * 1024 + t % 1024`:
    four neighbouring runs of 1,024 tokens share their counters, so that a GPU has use for all words of a counter
    without moving any.

    Args:
        seeds: 64 bits each, int64 of any shape.
        steps: how many tokens the row has generated, int64 of the same shape.
        tokens: ids, int64 of the same shape.
    """
    counters = tokens // BLOCK * LANES + tokens % LANES
    words = torch.stack(_words_of(counters, seeds, steps))
    return words.gather(0, (tokens // LANES % 4)[None])[0]


def find_all_words(seeds: torch.Tensor, steps: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Returns the random words of all tokens of some rows, as `find_words` has them: int64 [rows, vocabulary].

    Args:
        seeds: int64 [rows].
        steps: int64 [rows].
        vocabulary: how many tokens there are.
    """
    blocks, lanes = -(-vocabulary // BLOCK), min(vocabulary, LANES)
    counters = torch.arange(blocks * lanes, device=seeds.device)
    words = _words_of(counters, seeds[:, None], steps[:, None])
    # Of less than 1,024 tokens all have the first word, and of more each word has 1,024 of each block.
    in_order = torch.stack([word.reshape(-1, blocks, lanes) for word in words], 2)
    return in_order.reshape(len(seeds), blocks * len(words) * lanes)[:, :vocabulary]


def _words_of(counters: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor) -> Words:
    zero = torch.zeros_like(counters)
    return philox((counters, zero, steps & _WORD, zero), (seeds & _WORD, (seeds >> 32) & _WORD))


def to_exponential(words: torch.Tensor) -> torch.Tensor:
    """Returns numbers of the exponential distribution of mean 1, float64, from 1.2e-10 to 22.9.

    With `u = (word + 0.5) / 2**32`, which is never 0 or 1, the number is `-log(1 - u)`. A small number makes a token
    likely to win, and that is where they are finest: the smallest ones are apart by 2**-32, and `log1p` keeps all
    digits of them. A token's probability is so held to a part in 2**32 of the whole.
    """
    return -torch.log1p((words.double() + 0.5) * -(2.0**-32))


def to_gumbel(words: torch.Tensor) -> torch.Tensor:
    """Returns numbers of the standard Gumbel distribution, float64, from -3.2 to 22.9: `-log` of the exponential ones.

    (E. J. Gumbel, "Statistical Theory of Extreme Values and Some Practical Applications", 1954.)
    """
    return -to_exponential(words).log()
