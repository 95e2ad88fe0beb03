"""Choosing and stopping, on logits and token ids made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from batchgen.generation.finite import NotFinite
from batchgen.generation.sampling import Sampler, SamplingTensors, _keep_nucleus, sample
from batchgen.generation.stopping import Stopper, StopTexts, cut
from batchgen.types import Prompt, SamplingParams
from tests.tiny_models import END, END_OF_TURN, byte_tokenizer

CPU = torch.device("cpu")


def prompt(number: int = 0, **params: Any) -> Prompt:
    return Prompt(number, f"row-{number}", number + 1, "", [1, 5], SamplingParams(**params), {})


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


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.8), (5, 1.0), (7, 0.6), (1, 1.0), (1000, 0.5), (0, 1e-9)])
def test_exactly_the_tokens_are_kept_that_transformers_keeps(top_k: int, top_p: float) -> None:
    torch.manual_seed(2)
    logits = torch.randn(30) * 3
    warped = TemperatureLogitsWarper(1.5)(None, logits[None])
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    kept = set(warped[0].isfinite().nonzero().flatten().tolist())
    draws = 20_000
    uniform = torch.linspace(0, 1, draws + 1, dtype=torch.float64)[:-1]
    temperatures, nuclei = (torch.full((draws,), number, dtype=torch.float64) for number in (1.5, top_p))
    params = SamplingTensors(temperatures, torch.full((draws,), top_k), top_k, nuclei)
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
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    sampler = Sampler([prompt(temperature=temperature)], CPU)
    assert all(sampler(torch.empty(0), logits.clone()).argmax(-1).item() == 1 for _ in range(100))


def test_greedy_rows_keep_their_logits_beside_sampled_ones() -> None:
    torch.manual_seed(3)
    logits = torch.randn(3, 50)
    scores = Sampler([prompt(0), prompt(1, temperature=1.0), prompt(2)], CPU)(torch.empty(0), logits.clone())
    assert torch.equal(scores[[0, 2]], logits[[0, 2]])
    assert scores[1].isposinf().sum() == 1


def test_top_k_of_one_is_greedy_beside_rows_with_other_settings() -> None:
    torch.manual_seed(4)
    rows = [prompt(0, temperature=2.0, top_k=1), prompt(1, temperature=2.0, top_k=40), prompt(2, temperature=1.0)]
    sampler = Sampler(rows, CPU)
    for _ in range(200):
        logits = torch.randn(3, 50)
        assert sampler(torch.empty(0), logits.clone())[0].argmax() == logits[0].argmax()


def test_a_row_draws_the_same_wherever_it_stands_and_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    steps = torch.randn(150, 64) / 4  # more steps than are drawn at a time
    rows = [prompt(n, temperature=1.0, top_p=0.9 if n % 2 else 1.0, top_k=n * 8) for n in range(5)]

    def tokens(order: Sequence[int]) -> dict[int, list[int]]:
        sampler = Sampler([rows[n] for n in order], CPU)
        chosen = [sampler(torch.empty(0), step.repeat(len(order), 1)).argmax(-1).tolist() for step in steps]
        return {n: [step[place] for step in chosen] for place, n in enumerate(order)}

    together = tokens([0, 1, 2, 3, 4])
    assert len(set(map(tuple, together.values()))) == 5
    assert tokens([3, 0]) == {n: together[n] for n in (3, 0)}
    monkeypatch.setattr("batchgen.generation.sampling._ELEMENTS_AT_ONCE", 128)
    assert tokens([4, 3, 2, 1, 0]) == together


def test_another_seed_draws_another_text() -> None:
    logits = torch.zeros(1, 1000)
    first, second = (Sampler([prompt(temperature=1.0, seed=seed)], CPU) for seed in (0, 1))
    draws = [[s(torch.empty(0), logits.clone()).argmax().item() for _ in range(20)] for s in (first, second)]
    assert draws[0] != draws[1]


class Feed:
    """Feeds token ids to a `Stopper` as `generate` does: a column a step, until all rows are done."""

    def __init__(self, prompts: Sequence[Prompt], stop: Callable[[], bool] = lambda: False) -> None:
        tokenizer = byte_tokenizer()
        self.counted: list[int] = []
        special = {token: index for index, token in enumerate(("<pad>", "<s>", "</s>", "<|end|>"))}
        texts = StopTexts(prompts, [END, END_OF_TURN], lambda ids: tokenizer.decode(ids, True), special)
        not_finite = NotFinite()
        not_finite.rows = torch.zeros(len(prompts), dtype=torch.bool)
        count = self.counted.append
        self.stopper = Stopper(prompts, texts, not_finite, device=CPU, stop=stop, count=count)
        self.tokenizer = tokenizer

    def rows(self, rows: Sequence[Sequence[int]]) -> None:
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        for step in range(1, width + 1):
            if self.stopper(ids[:, :step], None).all():
                return

    def texts(self, *texts: str) -> None:
        self.rows([self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])


def test_each_row_ends_at_its_own_length() -> None:
    feed = Feed([prompt(0, max_new_tokens=2), prompt(1, max_new_tokens=5), prompt(2, max_new_tokens=1)])
    feed.rows([[9] * 8] * 3)
    assert feed.stopper.lengths.tolist() == [2, 5, 1]
    assert not feed.stopper.stopped.any()
    assert feed.stopper.steps == 5
    assert feed.counted == [3, 2, 1, 1, 1]


def test_every_end_token_ends_a_row_and_is_counted() -> None:
    feed = Feed([prompt(n, max_new_tokens=4) for n in range(4)])
    feed.rows([[9, END, 0, 0], [9, 9, END_OF_TURN, 0], [9, 9, 9, END], [9, 9, 9, 9]])
    assert feed.stopper.lengths.tolist() == [2, 3, 4, 4]
    assert feed.stopper.stopped.tolist() == [True, True, True, False]
    assert sum(feed.counted) == 13


def test_a_row_ends_with_the_token_that_completes_one_of_its_own_stop_texts() -> None:
    feed = Feed(
        [
            prompt(0, max_new_tokens=40, stop=("nowhere", "two")),
            prompt(1, max_new_tokens=40),
            prompt(2, max_new_tokens=40, stop=("é!",)),
            prompt(3, max_new_tokens=3, stop=("two",)),
        ]
    )
    feed.texts("one two three four", "one two three four", "déjà vé! encore", "one two")
    assert feed.stopper.lengths.tolist() == [7, 18, 11, 3]
    assert feed.stopper.stopped.tolist() == [True, False, True, False]


def test_a_long_stop_text_is_found_after_a_long_beginning() -> None:
    stop = "→ the end of it, which is long ←" * 3
    feed = Feed([prompt(max_new_tokens=1000, stop=(stop,))])
    feed.texts("x" * 300 + stop + "y" * 20)
    assert feed.stopper.lengths.tolist() == [300 + len(stop.encode())]


def test_a_stop_text_that_names_a_special_token_stops_there() -> None:
    feed = Feed([prompt(max_new_tokens=9, stop=("<pad>",))])
    feed.rows([[9, 9, 0, 9]])
    assert feed.stopper.lengths.tolist() == [3]
    assert feed.stopper.stopped.all()


def test_a_stop_request_ends_all_rows_at_once() -> None:
    answers = iter([False, False, True])
    feed = Feed([prompt(0, max_new_tokens=50), prompt(1, max_new_tokens=50)], stop=lambda: next(answers))
    feed.rows([[9] * 50] * 2)
    assert feed.stopper.abandoned
    assert feed.stopper.steps == 3


def test_a_stop_request_at_the_last_step_lets_the_batch_finish() -> None:
    feed = Feed([prompt(max_new_tokens=1)], stop=lambda: True)
    feed.rows([[9]])
    assert not feed.stopper.abandoned


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [("a b c", (), "a b c"), ("a b c", ("c", "b"), "a "), (" a ", ("x",), " a "), ("stop", ("stop",), "")],
)
def test_a_text_is_cut_before_the_first_stop_text(text: str, stops: tuple[str, ...], expected: str) -> None:
    assert cut(text, stops) == expected


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
