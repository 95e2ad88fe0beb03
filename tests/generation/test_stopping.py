"""Where rows end: token by token, and in a batch as `generate` feeds it; on token ids made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from batchgen.generation.ends import LENGTH, STOP, End, EndFinder
from batchgen.generation.finite import NotFinite
from batchgen.generation.processor import ChosenToken
from batchgen.generation.results import Ended, make_generation, make_generations
from batchgen.generation.stopping import Stopper
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Details, Markup, Prompt, SamplingParams, Thinking
from tests.tiny_models import END, END_OF_TURN, PAD

CPU = torch.device("cpu")
OPEN = Markup(Thinking("<t>", "</t>", is_open=True))
NOT_OPEN = Markup(Thinking("<t>", "</t>", is_open=False))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> HfTokenizer:
    """One token a byte; two tokens end a text."""
    made = HfTokenizer(str(tiny_llama))
    made.end_tokens = [END, END_OF_TURN]
    return made


def prompt(number: int = 0, markup: Markup | None = None, **params: Any) -> Prompt:
    own = SamplingParams(**{"max_new_tokens": 40} | params)
    return Prompt(number, f"row-{number}", number + 1, "", [1, 5], own, {}, markup=markup)


def tokens_of(tokenizer: HfTokenizer, *texts: str | int) -> list[int]:
    """The tokens of texts, and ids as they are."""
    parts = [tokenizer.tokenize([t], special=False)[0] if isinstance(t, str) else [t] for t in texts]
    return [token for part in parts for token in part]


STAR = 13  # "*"

# What a model would go on to say, its parameters, how much of it becomes text, and why the row ended.
ENDS: dict[str, tuple[Sequence[str | int], dict[str, Any], str, End]] = {
    "end of sequence": (["one", END, "two"], {}, "one", STOP),
    "any end of sequence": (["one", END_OF_TURN, "two"], {}, "one", STOP),
    "length": (["one two"], {"max_new_tokens": 4}, "one ", LENGTH),
    "end of sequence as the last token": (["one", END], {"max_new_tokens": 4}, "one", STOP),
    "ends ignored": (["one", END, "two"], {"ignore_eos": True, "max_new_tokens": 7}, "onetwo", LENGTH),
    "ends ignored and shown": (
        ["one", END, "two"],
        {"ignore_eos": True, "max_new_tokens": 7, "skip_special_tokens": False},
        "one</s>two",
        LENGTH,
    ),
    "stop token": (["one*two"], {"stop_token_ids": (STAR,)}, "one", End("stop", STAR)),
    "stop token included": (
        ["one*two"],
        {"stop_token_ids": (STAR,), "include_stop_str_in_output": True},
        "one*",
        End("stop", STAR),
    ),
    "end of sequence included": (
        ["one", END],
        {"include_stop_str_in_output": True, "skip_special_tokens": False},
        "one</s>",
        STOP,
    ),
    "stop token before the length": (
        ["one*two"],
        {"stop_token_ids": (STAR,), "max_new_tokens": 4},
        "one",
        End("stop", STAR),
    ),
    "an end of sequence that is a stop token, too": (["a", END], {"stop_token_ids": (END,)}, "a", STOP),
    "one that is ignored is a stop token still": (
        ["a", END],
        {"stop_token_ids": (END,), "ignore_eos": True},
        "a",
        End("stop", END),
    ),
    "stop text": (["one two three"], {"stop": ("nowhere", "two")}, "one ", End("stop", "two")),
    "stop text included": (
        ["one two three"],
        {"stop": ("two",), "include_stop_str_in_output": True},
        "one two",
        End("stop", "two"),
    ),
    "stop text of characters of several tokens": (["déjà vé! encore"], {"stop": ("é!",)}, "déjà v", End("stop", "é!")),
    "stop text at the length": (["one two"], {"stop": ("two",), "max_new_tokens": 7}, "one ", End("stop", "two")),
    "the one that is whole first": (["x abcdef"], {"stop": ("abcde", "cd")}, "x ab", End("stop", "cd")),
    "of those that end together the first": (["x abcd"], {"stop": ("cd", "bcd")}, "x ab", End("stop", "cd")),
    "stop text before min_tokens is none": (
        ["one one one"],
        {"stop": ("one",), "min_tokens": 3},
        "one ",
        End("stop", "one"),
    ),
    "stop text across min_tokens": (["one one"], {"stop": ("one",), "min_tokens": 2}, "", End("stop", "one")),
    "long stop text": (
        ["x" * 30 + "→ the end ←" * 3 + "y" * 9],
        {"stop": ("→ the end ←" * 3,), "max_new_tokens": 400},
        "x" * 30,
        End("stop", "→ the end ←" * 3),
    ),
    "name of a special token": (["one", PAD, "two"], {"stop": ("<pad>",)}, "one", End("stop", "<pad>")),
    "name of a special token included": (
        ["one", PAD, "two"],
        {"stop": ("<pad>",), "include_stop_str_in_output": True},
        "one<pad>",
        End("stop", "<pad>"),
    ),
    "name of a special token that is shown": (
        ["one", PAD, "two"],
        {"stop": ("<pad>",), "skip_special_tokens": False},
        "one",
        End("stop", "<pad>"),
    ),
    "stop text asleep in the thinking": (
        ["let me stop</t>now stop here"],
        {"stop": ("stop",), "markup": OPEN},
        "let me stop</t>now ",
        End("stop", "stop"),
    ),
    "stop text awake where the model does not think": (
        ["let me stop</t>now"],
        {"stop": ("stop",), "markup": NOT_OPEN},
        "let me ",
        End("stop", "stop"),
    ),
    "stop text asleep where the model begins to think": (
        ["\n<t>let me stop</t>now stop here"],
        {"stop": ("stop",), "markup": NOT_OPEN, "max_new_tokens": 60},
        "\n<t>let me stop</t>now ",
        End("stop", "stop"),
    ),
    "stop text that reaches out of the thinking": (
        ["let me</t>me</t>"],
        {"stop": ("t>me",), "markup": OPEN, "max_new_tokens": 15},
        "let me</t>me</t",
        LENGTH,
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_row_ends_where_and_why_it_should(name: str, tokenizer: HfTokenizer) -> None:
    said, params, text, expected = ENDS[name]
    row = prompt(**params)
    finder, tokens = EndFinder(row, tokenizer), tokens_of(tokenizer, *said)
    ends = []
    for token in tokens:
        ends.append(finder.append(token))
        if ends[-1] is not None:
            break
    assert ends[-1] == expected
    generation = make_generation(Ended(row, tokens[: len(ends)], expected), tokenizer)
    assert (generation.text, generation.finish_reason) == (text, expected.reason)
    assert generation.generated_tokens == len(ends)
    if expected.stop_reason is not None:
        assert generation.details is not None
        assert generation.details.stop_reason == expected.stop_reason


def test_rows_that_end_together_have_the_texts_of_each_alone(tokenizer: HfTokenizer) -> None:
    rows = []
    for said, params, _, end in ENDS.values():
        for skips in (True, False):
            row = prompt(**{**params, "skip_special_tokens": skips})
            rows.append(Ended(row, tokens_of(tokenizer, *said), end))
    together = make_generations(rows, tokenizer)
    assert together == [make_generation(row, tokenizer) for row in rows]
    assert make_generations([], tokenizer) == []


def test_a_row_that_asks_for_nothing_has_no_details(tokenizer: HfTokenizer) -> None:
    tokens = tokens_of(tokenizer, "one", END)
    assert make_generation(Ended(prompt(), tokens, STOP), tokenizer).details is None
    asking = make_generation(Ended(prompt(return_token_ids=True), tokens, STOP), tokenizer)
    assert asking.details == Details(token_ids=tokens, prompt_token_ids=[1, 5])


@pytest.mark.parametrize(
    ("markup", "said", "raw", "count"),
    [
        (OPEN, ["abc</t>x", END], "abc</t>x", 3),
        (OPEN, ["abc", END], "abc", 3),
        (OPEN, ["abc", END_OF_TURN], "abc", 3),
        (OPEN, ["ab", PAD, "</t>x"], "ab<pad></t>x", 3),
        (NOT_OPEN, [" <t>abc</t>x<t>y</t>"], " <t>abc</t>x<t>y</t>", 3),
        (NOT_OPEN, ["<t>abc"], "<t>abc", 3),
        (NOT_OPEN, ["x<t>abc</t>"], "x<t>abc</t>", 0),
        (Markup(), ["x", PAD, "y", END], "x<pad>y", None),
    ],
)
def test_what_the_model_wrote_is_kept_and_its_thinking_counted(
    markup: Markup, said: Sequence[str | int], raw: str, count: int | None, tokenizer: HfTokenizer
) -> None:
    tokens = tokens_of(tokenizer, *said)
    end = STOP if tokens[-1] in tokenizer.end_tokens else LENGTH
    details = make_generation(Ended(prompt(markup=markup), tokens, end), tokenizer).details
    assert details == Details(raw_text=raw, reasoning_tokens=count)


class Feed:
    """Feeds token ids to a `Stopper` as `generate` does: a column a step, until all rows are done."""

    def __init__(
        self, prompts: Sequence[Prompt], tokenizer: HfTokenizer, stop: Callable[[], bool] = lambda: False
    ) -> None:
        self.counted: list[int] = []
        not_finite = NotFinite()
        not_finite.rows = torch.zeros(len(prompts), dtype=torch.bool)
        chosen = ChosenToken(prompts, tokenizer, CPU, not_finite, None)
        self.stopper = Stopper(prompts, tokenizer, not_finite, chosen, stop=stop, count=self.counted.append)

    def rows(self, rows: Sequence[Sequence[int]]) -> None:
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        for step in range(1, width + 1):
            if self.stopper(ids[:, :step], None).all():
                return


def test_each_row_of_a_batch_ends_at_its_own_length(tokenizer: HfTokenizer) -> None:
    feed = Feed([prompt(n, max_new_tokens=most) for n, most in enumerate((2, 5, 1))], tokenizer)
    feed.rows([[9] * 8] * 3)
    assert feed.stopper.lengths.tolist() == [2, 5, 1]
    assert feed.stopper.read_ends() == [LENGTH] * 3
    assert feed.stopper.steps == 5
    assert feed.counted == [3, 2, 1, 1, 1]


def test_every_end_token_ends_a_row_and_is_counted(tokenizer: HfTokenizer) -> None:
    feed = Feed([prompt(n, max_new_tokens=4) for n in range(4)], tokenizer)
    feed.rows([[9, END, 0, 0], [9, 9, END_OF_TURN, 0], [9, 9, 9, END], [9, 9, 9, 9]])
    assert feed.stopper.lengths.tolist() == [2, 3, 4, 4]
    assert feed.stopper.read_ends() == [STOP, STOP, STOP, LENGTH]
    assert sum(feed.counted) == 13


def test_rows_that_are_followed_end_beside_others(tokenizer: HfTokenizer) -> None:
    rows = [
        prompt(0, stop=("two",)),
        prompt(1),
        prompt(2, ignore_eos=True, max_new_tokens=9),
        prompt(3, stop=("two",), max_new_tokens=3),
        prompt(4, stop_token_ids=(END, STAR)),
    ]
    feed = Feed(rows, tokenizer)
    assert not feed.stopper.ends_by_token
    said = [["one two three"], ["one", END], ["one", END, "two three"], ["one two"], ["one*"]]
    feed.rows([tokens_of(tokenizer, *text) for text in said])
    assert feed.stopper.lengths.tolist() == [7, 4, 9, 3, 4]
    assert feed.stopper.read_ends() == [End("stop", "two"), STOP, LENGTH, LENGTH, End("stop", STAR)]


def test_a_stop_request_ends_all_rows_at_once(tokenizer: HfTokenizer) -> None:
    answers = iter([False, False, True])
    feed = Feed([prompt(0), prompt(1)], tokenizer, stop=lambda: next(answers))
    feed.rows([[9] * 40] * 2)
    assert feed.stopper.abandoned
    assert feed.stopper.steps == 3


def test_a_stop_request_at_the_last_step_lets_the_batch_finish(tokenizer: HfTokenizer) -> None:
    feed = Feed([prompt(max_new_tokens=1)], tokenizer, stop=lambda: True)
    feed.rows([[9]])
    assert not feed.stopper.abandoned
