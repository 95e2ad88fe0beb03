"""Drawing and choosing tokens, on logits made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from batchgen.generation.choosing import TokenChooser
from batchgen.generation.sampling import SamplingTensors, _keep_nucleus, sample
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


def test_tokens_come_as_often_as_the_softmax_says() -> None:
    torch.manual_seed(1)
    logits = torch.randn(20) * 2
    temperature = 0.7
    draws = 40_000
    uniform = torch.rand(draws, dtype=torch.float64)
    temperatures = torch.full((draws,), temperature, dtype=torch.float64)
    params = SamplingTensors(temperatures, torch.zeros(draws, dtype=torch.long), 0, None)
    tokens = sample(logits.expand(draws, -1), uniform, params)
    expected = (logits.double() / temperature).softmax(-1) * draws
    squared = (torch.bincount(tokens, minlength=20) - expected) ** 2 / expected
    # The chi-square distribution with 19 degrees of freedom is above 43.8 once in a thousand.
    assert squared.sum() < 43.8


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
    uniform = torch.linspace(0, 1, draws + 1, dtype=torch.float64)[:-1]
    temperatures, nuclei, shares = (torch.full((draws,), n, dtype=torch.float64) for n in (1.5, top_p, min_p))
    params = SamplingTensors(temperatures, torch.full((draws,), top_k), top_k, nuclei, shares)
    tokens = sample(logits.expand(draws, -1), uniform, params)
    assert set(tokens.tolist()) == kept
    shares = torch.bincount(tokens, minlength=30) / draws
    assert torch.allclose(shares, warped[0].softmax(-1), atol=2 / draws)


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
        return _keep_nucleus(logits[rows].double().softmax(-1), top_p[rows])

    monkeypatch.setattr("batchgen.generation.sampling._CANDIDATES", 60)
    whole = kept(slice(None))
    assert ((whole > 0).sum(-1) < 60).sum() >= 20
    monkeypatch.setattr("batchgen.generation.sampling._CANDIDATES", candidates)
    assert torch.equal(kept(slice(None)), whole)
    for row in range(32):  # alone, each takes its own way
        assert torch.equal(kept(slice(row, row + 1))[0], whole[row])


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_chosen(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 2.0, -torch.inf, 1.0, -torch.inf]])
    tokens = sample(
        logits,
        torch.tensor([uniform], dtype=torch.float64),
        SamplingTensors(torch.tensor([1.0], dtype=torch.float64), torch.tensor([0]), 0, None),
    )
    assert tokens.item() in (1, 3)


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


def test_probabilities_of_a_large_vocabulary_add_up() -> None:
    """float32 sums over 250,000 equal tokens would be off by many tokens."""
    size = 250_880
    wanted = torch.tensor([0, 1, 125_000, size - 1])
    tokens = sample(
        torch.zeros(4, size),
        (wanted.double() + 0.5) / size,
        SamplingTensors(torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.long), 0, None),
    )
    assert tokens.tolist() == wanted.tolist()
