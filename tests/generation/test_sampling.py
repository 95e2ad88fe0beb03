"""Drawing and choosing tokens, on logits made by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from batchgen.generation.choosing import TokenChooser
from batchgen.generation.random_numbers import find_all_words, to_gumbel
from batchgen.generation.sampling import SamplingTensors, _find_nucleus, sample
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Prompt, SamplingParams

CPU = torch.device("cpu")


def prompt(number: int = 0, **params: Any) -> Prompt:
    return Prompt(number, f"row-{number}", number + 1, "", [1, 5], SamplingParams(**params), {})


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> HfTokenizer:
    return HfTokenizer(str(tiny_llama))


class Chooser:
    """Chooses for rows whose places are their numbers."""

    def __init__(self, prompts: Sequence[Prompt], tokenizer: HfTokenizer, width: int) -> None:
        self.chooser = TokenChooser(len(prompts), width, tokenizer, CPU)
        self._places = range(len(prompts))
        for place, row in enumerate(prompts):
            self.chooser.begin(place, row)

    def choose(self, logits: torch.Tensor) -> list[int]:
        tokens: list[int] = self.chooser.choose(logits, self._places, logits.argmax(-1)).tokens.tolist()
        return tokens


def draw(logits: torch.Tensor, count: int, temperature: float = 1.0, seed: int = 3, **params: Any) -> torch.Tensor:
    """The tokens of this many steps of one row, all with the same logits, [vocabulary]."""
    numbers = SamplingTensors.of([SamplingParams(temperature=temperature, **params)] * count, CPU)
    return sample(logits.expand(count, -1), torch.full((count,), seed), torch.arange(count), numbers)


# A row keeps all tokens, or few: the two ways in which random numbers are computed on a CPU.
@pytest.mark.parametrize("others", [0, 700, 5000])
def test_tokens_come_as_often_as_the_softmax_says(others: int) -> None:
    torch.manual_seed(1)
    likely = torch.randn(20) * 2
    logits = torch.full((20 + others,), -torch.inf)
    places = torch.randperm(20 + others)[:20].sort().values
    logits[places] = likely
    temperature, draws = 0.7, 10_000
    counts = torch.bincount(draw(logits, draws, temperature), minlength=len(logits))
    assert counts[places].sum() == draws
    expected = (likely.double() / temperature).softmax(-1) * draws
    # The chi-square distribution with 19 degrees of freedom is above 43.8 once in a thousand.
    assert ((counts[places] - expected) ** 2 / expected).sum() < 43.8


def test_draws_of_one_row_and_of_neighbouring_seeds_are_independent() -> None:
    logits, count = torch.zeros(4), 20_000
    one, other = draw(logits, count, seed=8), draw(logits, count, seed=9)
    expected = count / 16
    for first, second in ((one, other), (one[:-1], one[1:])):
        counts = torch.bincount(first * 4 + second, minlength=16)
        # 15 degrees of freedom: above 37.7 once in a thousand.
        assert ((counts - expected) ** 2 / expected).sum() < 37.7


@pytest.mark.parametrize(
    ("min_p", "top_k", "top_p"),
    [
        (0.0, 0, 0.8),
        (0.0, 5, 1.0),
        (0.0, 7, 0.6),
        (0.0, 1, 1.0),
        (0.0, 1000, 0.5),
        (0.0, 0, 1e-9),
        (0.1, 0, 1.0),
        (0.05, 4, 1.0),
        (0.05, 8, 0.7),
        (1.0, 0, 1.0),
    ],
)
def test_exactly_the_tokens_are_kept_that_transformers_keeps(min_p: float, top_k: int, top_p: float) -> None:
    torch.manual_seed(2)
    logits = torch.randn(30) * 3
    warped = TemperatureLogitsWarper(1.5)(None, logits[None])
    if min_p:
        warped = MinPLogitsWarper(min_p)(None, warped)
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    kept = set(warped[0].isfinite().nonzero().flatten().tolist())
    draws = 20_000
    tokens = draw(logits, draws, 1.5, min_p=min_p, top_k=top_k, top_p=top_p)
    expected = warped[0].double().softmax(-1) * draws
    assert {token for token in kept if expected[token] > 20} <= set(tokens.tolist()) <= kept
    counts = torch.bincount(tokens, minlength=30)
    # Up to 29 degrees of freedom: above 58.3 at most once in a thousand.
    assert (((counts - expected) ** 2)[expected > 0] / expected[expected > 0]).sum() < 58.3


@pytest.mark.parametrize("candidates", [1, 4, 20])
def test_a_few_candidates_hold_the_same_nucleus_as_the_whole_vocabulary(
    candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = torch.Generator().manual_seed(6)
    peaked = torch.randn(8, 60, generator=source) * 5
    ties = torch.randint(0, 4, (8, 60), generator=source).float()
    noise = torch.randn(8, 60, generator=source) / 10
    short = torch.where(torch.rand(8, 60, generator=source) < 0.9, -torch.inf, peaked)
    logits = torch.cat([peaked, ties, noise, short])[torch.randperm(32, generator=source)]
    top_p = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64).repeat(8)

    def kept(rows: slice) -> torch.Tensor:
        probabilities = logits[rows].double().softmax(-1)
        return _find_nucleus(probabilities, top_p[rows]) & (probabilities > 0)

    monkeypatch.setattr("batchgen.generation.sampling._CANDIDATES", 60)
    whole = kept(slice(None))
    assert (whole.sum(-1) < 60).sum() >= 20
    monkeypatch.setattr("batchgen.generation.sampling._CANDIDATES", candidates)
    assert torch.equal(kept(slice(None)), whole)
    for row in range(32):  # alone, each takes its own way
        assert torch.equal(kept(slice(row, row + 1))[0], whole[row])


def test_a_token_of_probability_zero_is_never_chosen() -> None:
    logits = torch.tensor([-torch.inf, 2.0, -torch.inf, 1.0, -torch.inf])
    assert set(draw(logits, 2000).tolist()) == {1, 3}


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-3])
def test_the_smallest_temperatures_are_greedy(temperature: float, tokenizer: HfTokenizer) -> None:
    chooser = Chooser([prompt(temperature=temperature)], tokenizer, 3)
    assert all(chooser.choose(torch.tensor([[1.0, 3.0, 2.0]])) == [1] for _ in range(100))


def test_greedy_rows_have_the_best_token_beside_sampled_ones(tokenizer: HfTokenizer) -> None:
    torch.manual_seed(3)
    chooser = Chooser([prompt(0), prompt(1, temperature=5.0), prompt(2)], tokenizer, 50)
    drawn = set()
    for _ in range(20):
        logits = torch.randn(3, 50)
        before = logits.clone()
        first, sampled, last = chooser.choose(logits)
        assert [first, last] == logits[[0, 2]].argmax(-1).tolist()
        assert torch.equal(logits, before)
        drawn.add(sampled)
    assert len(drawn) > 10


def test_top_k_of_one_is_greedy_beside_rows_with_other_settings(tokenizer: HfTokenizer) -> None:
    torch.manual_seed(4)
    rows = [prompt(0, temperature=2.0, top_k=1), prompt(1, temperature=2.0, top_k=40), prompt(2, temperature=1.0)]
    chooser = Chooser(rows, tokenizer, 50)
    for _ in range(200):
        logits = torch.randn(3, 50)
        assert chooser.choose(logits)[0] == logits[0].argmax()


def test_a_row_draws_the_same_wherever_it_stands_and_whatever_the_chunk(
    monkeypatch: pytest.MonkeyPatch, tokenizer: HfTokenizer
) -> None:
    torch.manual_seed(5)
    steps = torch.randn(150, 64) / 4
    rows = [prompt(n, temperature=1.0, top_p=0.9 if n % 2 else 1.0, top_k=n * 8, min_p=n / 50) for n in range(5)]
    rows += [prompt(n, temperature=1.0, frequency_penalty=0.1) for n in range(5, 8)]

    def tokens(order: Sequence[int]) -> dict[int, list[int]]:
        chooser = Chooser([rows[n] for n in order], tokenizer, 64)
        chosen = [chooser.choose(step.repeat(len(order), 1)) for step in steps]
        return {n: [step[place] for step in chosen] for place, n in enumerate(order)}

    together = tokens(range(8))
    assert len(set(map(tuple, together.values()))) == 8
    assert tokens([3, 0, 6]) == {n: together[n] for n in (3, 0, 6)}
    for module in ("sampling", "row_groups"):
        monkeypatch.setattr(f"batchgen.generation.{module}._ELEMENTS_AT_ONCE", 128)
    assert tokens([7, 4, 6, 3, 2, 5, 1, 0]) == together


def test_another_seed_draws_another_text(tokenizer: HfTokenizer) -> None:
    logits = torch.zeros(1, 1000)
    first, second = (Chooser([prompt(temperature=1.0, seed=seed)], tokenizer, 1000) for seed in (0, 1))
    draws = [[chooser.choose(logits)[0] for _ in range(20)] for chooser in (first, second)]
    assert draws[0] != draws[1]


@pytest.mark.parametrize("size", [1000, 5000, 70_000])
def test_the_largest_sum_of_logit_and_number_wins(size: int) -> None:
    """As in plain code, which adds all of them, though `sample` leaves out most."""
    source = torch.Generator().manual_seed(size)
    seeds = torch.randint(-(2**63), 2**63 - 1, (6,), generator=source)
    steps = torch.tensor([0, 1, 2, 500, 2**20, 2**31])
    numbers = to_gumbel(find_all_words(seeds, steps, size))
    for spread, temperature in itertools.product((0.1, 3.0, 20.0), (0.2, 1.0, 50.0)):
        logits = torch.randn(6, size, generator=source) * spread
        logits[0], logits[1, ::5] = 1.0, -torch.inf
        params = SamplingTensors.of([SamplingParams(temperature=temperature)] * 6, CPU)
        expected = (logits.double() / temperature + numbers).argmax(-1)
        assert torch.equal(sample(logits, seeds, steps, params), expected)


def test_the_smaller_id_wins_of_equal_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchgen.generation.sampling.find_words", lambda seeds, steps, tokens: tokens * 0)
    monkeypatch.setattr(
        "batchgen.generation.sampling.find_all_words", lambda seeds, steps, size: torch.zeros(len(seeds), size)
    )
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0])
    assert draw(logits, 3).tolist() == [1, 1, 1]
    assert draw(torch.cat([logits, torch.zeros(100)]), 3, top_k=3).tolist() == [1, 1, 1]


def test_rounding_of_logits_flips_no_more_draws_than_near_ties() -> None:
    """The cumulative distribution, by which tokens were drawn before, adds up the rounding of a whole vocabulary."""
    size, count = 50_000, 1000
    source = torch.Generator().manual_seed(9)
    logits = torch.randn(size, generator=source) * 3
    rounded = logits * (1 + 1e-6 * torch.randn(size, generator=source))
    params = SamplingTensors.of([SamplingParams(temperature=0.9)] * 20, CPU)
    steps = torch.full((20,), 5)
    one, other = (
        torch.cat([sample(each.expand(20, -1), seeds, steps, params) for seeds in torch.arange(count).view(-1, 20)])
        for each in (logits, rounded)
    )
    uniform = torch.rand(count, generator=source, dtype=torch.float64)
    before, after = (
        torch.searchsorted((each.double() / 0.9).softmax(-1).cumsum(-1), uniform) for each in (logits, rounded)
    )
    # The two largest sums of a draw are closer than d in a share of at most d of all draws: among many tokens, their
    # difference is exponential with mean 1. Logits of up to 13 move by some 1e-5 here: 0.02 such ties are expected.
    assert (one != other).sum() <= 1
    assert (before != after).sum() >= 5


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.5}])
def test_rows_whose_numbers_are_broken_change_no_other(params: dict[str, Any], number: float) -> None:
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    numbers = SamplingTensors.of([SamplingParams(temperature=0.9, **params)] * 3, CPU)
    seeds, steps = torch.tensor([1, 2, 3]), torch.tensor([4, 4, 4])
    expected = sample(logits, seeds, steps, numbers)
    logits[1] = number
    drawn = sample(logits, seeds, steps, numbers)
    assert drawn[[0, 2]].tolist() == expected[[0, 2]].tolist()
    assert 0 <= int(drawn[1]) < 2000
