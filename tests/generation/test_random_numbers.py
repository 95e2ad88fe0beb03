"""Random numbers that follow from a row, a step and a token."""

from __future__ import annotations

import math

import pytest
import torch

from batchgen.generation.random_numbers import find_all_words, find_words, philox, to_exponential, to_gumbel
from tests.generation import plain_random_numbers as plain

# Counter, key and the four words: of the file `kat_vectors` of Random123, "philox4x32 10".
_KNOWN = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), _KNOWN)
def test_known_counters_give_the_known_words(counter: list[int], key: list[int], expected: str) -> None:
    words = [int(word, 16) for word in expected.split()]
    assert plain.philox(counter, key) == words
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    assert [word.tolist() for word in philox((c0, c1, c2, c3), (k0, k1))] == [[word] for word in words]


@pytest.mark.parametrize("vocabulary", [1, 1000, 1024, 1025, 4000, 4096, 4097, 5200, 9000])
def test_each_token_has_its_word_alone_and_among_all(vocabulary: int) -> None:
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
    steps = torch.tensor([0, 1, 2**31, 2**32 - 1, 77])
    words = find_all_words(seeds, steps, vocabulary)
    assert words.shape == (5, vocabulary)
    rows = torch.arange(5).repeat_interleave(vocabulary)
    tokens = torch.arange(vocabulary).repeat(5)
    assert torch.equal(find_words(seeds[rows], steps[rows], tokens), words.flatten())
    some = sorted({0, vocabulary // 2, vocabulary - 1})
    for row, (seed, step) in enumerate(zip(seeds.tolist(), steps.tolist(), strict=True)):
        assert words[row, some].tolist() == [plain.find_word(seed % 2**64, step, token) for token in some]


def test_numbers_keep_their_digits_at_both_ends() -> None:
    words = torch.tensor([0, 1, 2**31, 2**32 - 1])
    expected = [-math.log1p(-(word + 0.5) / 2**32) for word in words.tolist()]
    assert to_exponential(words).tolist() == pytest.approx(expected, rel=1e-14)
    assert to_gumbel(words).tolist() == pytest.approx([-math.log(number) for number in expected], rel=1e-13)
    assert to_gumbel(words).tolist() == pytest.approx([22.8739, 21.7753, 0.3665, -3.1300], abs=1e-4)
