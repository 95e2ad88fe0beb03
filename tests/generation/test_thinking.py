"""A row's thinking, token by token: what is forced or offered beside a constraint, and where the answer begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchgen.generation.thinking_row import ThinkingRow
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Thinking
from tests.tiny_models import BEGIN, END_OF_TURN


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> HfTokenizer:
    return HfTokenizer(str(tiny_llama))


def follow(row: ThinkingRow, tokenizer: HfTokenizer, said: str) -> tuple[str, str]:
    """What comes out where a model wants to say `said`, with what is forced in its place, and what of it is answer."""
    wanted, text, answer = list(tokenizer.tokenize([said], special=False)[0]), [], []
    while wanted or row.forced is not None:
        token = wanted[0] if row.forced is None else row.forced
        wanted = wanted[wanted[:1] == [token] :]
        text.append(token)
        if row.append(token):
            answer.append(token)
    return tokenizer.decode(text, skip_special_tokens=False), tokenizer.decode(answer, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("is_open", "budget", "said", "text", "answer"),
    [
        (True, None, "abc</t>x", "abc</t>x", "x"),
        (True, 9, "abc</t>x", "abc</t>x", "x"),
        (True, 0, "abc", "</t>abc", "abc"),
        (True, 2, "abcd", "ab</t>cd", "cd"),
        (True, 3, "ab<t>x", "ab</t>x", "x"),  # it had begun to end: the mark is not written twice
        (True, 3, "a</t>x", "a</t>x", "x"),
        (True, 2, "a</t>x</t>y", "a</t>x</t>y", "x</t>y"),
        (False, 2, "<t>abcd", "<t>ab</t>cd", "cd"),
        (False, 2, " \n<t>abcd", " \n<t>ab</t>cd", "cd"),
        (False, 2, "<t>a</t>b<t>cdef", "<t>a</t>b<t>cdef", "b<t>cdef"),  # what comes later is answer
    ],
)
def test_the_end_mark_is_forced_once_as_much_was_thought_as_may_be(
    is_open: bool, budget: int | None, said: str, text: str, answer: str, tokenizer: HfTokenizer
) -> None:
    row = ThinkingRow(Thinking("<t>", "</t>", is_open), tokenizer, budget, is_constrained=False)
    assert follow(row, tokenizer, said) == (text, answer)
    assert row.state.is_over


def test_a_row_without_thinking_is_all_answer(tokenizer: HfTokenizer) -> None:
    row = ThinkingRow(Thinking("<t>", "</t>", False), tokenizer, 0, is_constrained=True)
    assert follow(row, tokenizer, "<t>a") == ("<t>a", "<t>a")  # a mark of several plain tokens is not offered
    assert row.offered is None


@pytest.mark.parametrize(
    ("start", "offered"),
    [("<s>", BEGIN), ("<|end|>x", END_OF_TURN), ("<t>", None)],
)
def test_a_start_mark_is_offered_where_no_constraint_can_mean_it(
    start: str, offered: int | None, tokenizer: HfTokenizer
) -> None:
    row = ThinkingRow(Thinking(start, "</t>", False), tokenizer, None, is_constrained=True)
    assert (row.offered, row.is_answer) == (offered, True)
    if offered is None:
        return
    assert not row.append(offered)
    while row.forced is not None:
        assert not row.is_answer
        row.append(row.forced)
    assert row.state.is_inside
    assert not row.is_answer
    assert row.offered is None
    assert follow(row, tokenizer, "ab</t>c") == ("ab</t>c", "c")
    assert row.is_answer
    assert row.state.tokens == 2
