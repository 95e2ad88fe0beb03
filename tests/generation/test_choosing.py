"""`TokenChooser` on logits made by hand: what it keeps of rows, what it gives back, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from batchgen.generation.choice import NOTHING_LEFT, Choice
from batchgen.generation.choosing import TokenChooser
from batchgen.generation.edits import MOST_SEEN, ONE_MORE, apply_bitmask, count_tokens
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Constraint, Markup, Prompt, SamplingParams, Thinking
from tests.tiny_models import END

CPU = torch.device("cpu")
WIDTH = 260
LETTERS = range(4, WIDTH)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> HfTokenizer:
    return HfTokenizer(str(tiny_llama))


def prompt(number: int, markup: Markup | None = None, **params: Any) -> Prompt:
    return Prompt(number, f"row-{number}", number + 1, "", [1, 5, 9], SamplingParams(**params), {}, markup=markup)


ROWS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "penalties": {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "temperature": 0.7},
    "bad words": {"bad_words": ("ab", "bc"), "allowed_token_ids": (68, 69, 70), "temperature": 2.0},
    "bias": {"logit_bias": ((30, 2.0),), "presence_penalty": 1.0},
    "at least": {"min_tokens": 30, "logit_bias": ((END, 5.0),)},
    "regex": {"constraint": Constraint("regex", "([a-e]{2},)+"), "temperature": 1.0},
    "thinking": {
        "markup": Markup(Thinking("<t>", "</t>", is_open=True)),
        "thinking_tokens": 8,
        "constraint": Constraint("regex", "[0-9]+"),
    },
}


def steps_of(count: int, rows: int) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(3)
    return [torch.randn(rows, WIDTH, generator=source) * 2 for _ in range(count)]


class Driver:
    """Chooses step by step, and gives back the tokens that are awaited."""

    def __init__(self, tokenizer: HfTokenizer, places: int) -> None:
        self.chooser = TokenChooser(places, WIDTH, tokenizer, CPU)

    def step(self, logits: torch.Tensor, places: Sequence[int]) -> list[int]:
        chosen = self.chooser.choose(logits, places, logits.argmax(-1))
        tokens: list[int] = chosen.tokens.tolist()
        awaited = {p: t for p, t in zip(places, tokens, strict=True) if self.chooser.awaits_tokens(p)}
        self.chooser.advance(awaited)
        return tokens


def test_a_row_that_is_computed_again_goes_on_as_if_it_had_not_been(tokenizer: HfTokenizer) -> None:
    """As a preempted row of `paged`, at another place, after each number of tokens."""
    rows = [prompt(n, **params) for n, params in enumerate(ROWS.values())]
    steps = steps_of(24, len(rows))
    whole = Driver(tokenizer, len(rows))
    for place, row in enumerate(rows):
        whole.chooser.begin(place, row)
    expected = [whole.step(logits, range(len(rows))) for logits in steps]
    texts = [[step[n] for step in expected] for n in range(len(rows))]
    assert len(set(map(tuple, texts))) == len(rows)
    again = Driver(tokenizer, len(rows))
    for stop in (0, 1, 5, 9, 13, 23):
        order = list(reversed(range(len(rows))))
        for place, n in enumerate(order):
            again.chooser.begin(place, rows[n], texts[n][:stop])
        for number in range(stop, len(steps)):
            found = again.step(steps[number][order], range(len(rows)))
            assert found == [expected[number][n] for n in order], (stop, number)


def test_a_place_keeps_nothing_of_the_row_before(tokenizer: HfTokenizer) -> None:
    steps = steps_of(10, 1)
    for name, params in ROWS.items():
        alone = Driver(tokenizer, 1)
        alone.chooser.begin(0, prompt(0))
        expected = [alone.step(logits, [0]) for logits in steps]
        used = Driver(tokenizer, 1)
        used.chooser.begin(0, prompt(1, **params))
        for logits in steps:
            used.step(logits, [0])
        used.chooser.end(0)
        used.chooser.begin(0, prompt(0))
        assert [used.step(logits, [0]) for logits in steps] == expected, name


def test_rows_may_come_in_any_choice_of_places(tokenizer: HfTokenizer) -> None:
    rows = [prompt(n, repetition_penalty=1.3, temperature=1.0) for n in range(12)]
    steps = steps_of(6, 12)
    together, some = Driver(tokenizer, 12), Driver(tokenizer, 12)
    for place, row in enumerate(rows):
        together.chooser.begin(place, row)
        some.chooser.begin(place, row)
    for logits in steps:
        expected = together.step(logits, range(12))
        odd, even = list(range(1, 12, 2)), list(range(10, -1, -2))
        assert some.step(logits[odd], odd) == [expected[n] for n in odd]
        assert some.step(logits[even], even) == [expected[n] for n in even]


def test_what_a_row_needs_is_said_before_its_token_is_chosen(tokenizer: HfTokenizer) -> None:
    chooser = TokenChooser(len(ROWS) + 1, WIDTH, tokenizer, CPU)
    found = {}
    for place, (name, params) in enumerate(ROWS.items()):
        chooser.begin(place, prompt(place, **params))
        found[name] = (chooser.is_edited(place), chooser.awaits_tokens(place))
    awaiting = {"bad words", "regex", "thinking"}
    assert found == {name: (name not in ("greedy", "sampled"), name in awaiting) for name in ROWS}
    assert not chooser.is_edited(len(ROWS)), "nobody is there"
    with pytest.raises(LookupError, match="no row has begun in place 8"):
        chooser.advance({len(ROWS): 1})


def test_a_row_is_edited_only_while_it_needs_to_be(tokenizer: HfTokenizer) -> None:
    driver = Driver(tokenizer, 2)
    driver.chooser.begin(0, prompt(0, min_tokens=2))
    budget = Markup(Thinking("<t>", "</t>", is_open=True))
    driver.chooser.begin(1, prompt(1, markup=budget, thinking_tokens=0))
    seen = []
    for logits in steps_of(6, 2):
        seen.append((driver.chooser.is_edited(0), driver.chooser.awaits_tokens(1)))
        driver.step(logits, [0, 1])
    assert seen == [(True, True), (True, True), (False, True), (False, True), (False, False), (False, False)]


def test_a_row_without_a_token_that_may_come_says_so_and_one_that_is_not_finite_keeps_its_mark(
    tokenizer: HfTokenizer,
) -> None:
    chooser = TokenChooser(4, WIDTH, tokenizer, CPU)
    for place in (0, 2):
        sampled = {"temperature": 1.0} if place else {}
        chooser.begin(place, prompt(place, allowed_token_ids=(END,), min_tokens=3, **sampled))
    chooser.begin(1, prompt(1, repetition_penalty=2.0))
    chooser.begin(3, prompt(3, temperature=1.0))
    best = torch.tensor([5, -1, 5, -1])
    found = chooser.choose(torch.randn(4, WIDTH), range(4), best)
    assert found.tokens.tolist() == [NOTHING_LEFT, -1, NOTHING_LEFT, -1]
    assert best.tolist() == [5, -1, 5, -1]


class Wire:
    """Carries the leader's tokens to the other rank, as `Peers.tokens` does."""

    def __init__(self) -> None:
        self.tokens = torch.empty(0)

    def lead(self, tokens: torch.Tensor) -> torch.Tensor:
        self.tokens = tokens.clone()
        return tokens

    def follow(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.copy_(self.tokens)


def test_ranks_take_and_count_what_the_first_of_them_has_chosen(tokenizer: HfTokenizer) -> None:
    """The other rank's logits differ, by more than ever they should, until the last step."""
    rows = [prompt(0, frequency_penalty=2.0), prompt(1, temperature=1.0, presence_penalty=2.0), prompt(2)]
    wire = Wire()
    leader = TokenChooser(3, WIDTH, tokenizer, CPU, agree=wire.lead)
    follower = TokenChooser(3, WIDTH, tokenizer, CPU, agree=wire.follow)
    for place, row in enumerate(rows):
        leader.begin(place, row)
        follower.begin(place, row)
    for step in steps_of(20, 3):
        shifted = step.roll(1, -1)
        first = leader.choose(step, range(3), step.argmax(-1)).tokens
        assert torch.equal(first, follower.choose(shifted, range(3), shifted.argmax(-1)).tokens)
    last = torch.zeros(3, WIDTH)
    expected = leader.choose(last, range(3), last.argmax(-1)).tokens
    follower._agree = None
    assert torch.equal(follower.choose(last, range(3), last.argmax(-1)).tokens, expected)


def choose_with_logprobs(tokenizer: HfTokenizer, logits: torch.Tensor, rows: Sequence[dict[str, Any]]) -> Choice:
    chooser = TokenChooser(len(rows), WIDTH, tokenizer, CPU)
    for place, params in enumerate(rows):
        chooser.begin(place, prompt(place, **params))
    return chooser.choose(logits, range(len(rows)), logits.argmax(-1))


def test_logprobs_are_of_the_models_own_distribution_or_of_what_the_constraint_leaves(tokenizer: HfTokenizer) -> None:
    rows: list[dict[str, Any]] = [
        {"logprobs": True, "top_logprobs": 3, "temperature": 1.0, "repetition_penalty": 1.7, "logit_bias": ((8, 9.0),)},
        {},
        {"logprobs": True, "constraint": Constraint("regex", "[abc]x"), "temperature": 1.0, "top_logprobs": 2},
        {"logprobs": True},
    ]
    torch.manual_seed(0)
    logits = torch.randn(4, WIDTH)
    found = choose_with_logprobs(tokenizer, logits, rows)
    assert found.logprobs is not None
    by_row = {row: place for place, row in enumerate(found.logprobs.rows)}
    assert sorted(by_row) == [0, 2, 3]
    allowed = logits.new_full((4, WIDTH), 0.0)
    allowed[2] = -torch.inf
    allowed[2, [68, 69, 70]] = 0.0
    expected = (logits + allowed).double().log_softmax(-1)
    for row, place in by_row.items():
        assert float(found.logprobs.logprobs[place]) == pytest.approx(float(expected[row, found.tokens[row]]), abs=1e-5)
        values, ids = expected[row].topk(3)
        assert found.logprobs.top_ids[place].tolist() == ids.tolist()
        assert found.logprobs.top_logprobs[place].tolist() == pytest.approx(values.tolist(), abs=1e-5)


def test_without_a_row_that_asks_there_are_no_logprobs(tokenizer: HfTokenizer) -> None:
    assert choose_with_logprobs(tokenizer, torch.randn(1, WIDTH), [{"temperature": 1.0}]).logprobs is None


def test_ids_outside_the_vocabulary_change_nothing(tokenizer: HfTokenizer) -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, WIDTH)
    params = {"logit_bias": ((10**6, 50.0),), "stop_token_ids": (7, 10**5), "repetition_penalty": 1.0001}
    assert choose_with_logprobs(tokenizer, logits, [params | {"min_tokens": 1}]).tokens.tolist() == [
        int(logits[0].argmax())
    ]


@pytest.mark.parametrize("words", [1, 2, 9])
def test_tokens_beyond_the_mask_and_without_their_bit_are_impossible(words: int) -> None:
    torch.manual_seed(2)
    mask = torch.randint(-(2**31), 2**31, (3, words), dtype=torch.int64).to(torch.int32)
    logits = torch.randn(3, 70)
    expected = logits.clone()
    for row in range(3):
        for token in range(70):
            is_allowed = token < 32 * words and int(mask[row, token // 32]) & 0xFFFFFFFF & 1 << token % 32
            expected[row, token] = expected[row, token] if is_allowed else -torch.inf
    apply_bitmask(logits, mask)
    assert torch.equal(logits, expected)


def test_counts_stay_where_they_are_when_they_are_full() -> None:
    seen = torch.tensor([[MOST_SEEN - ONE_MORE, MOST_SEEN, MOST_SEEN - 1, 0]], dtype=torch.int16)
    for token in (0, 1, 2, 3):
        count_tokens(seen, torch.tensor([0]), torch.tensor([token]))
    assert seen.tolist() == [[MOST_SEEN, MOST_SEEN, MOST_SEEN - 1, ONE_MORE]]
