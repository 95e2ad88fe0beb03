"""A model's chat template is a program that came with the model: whatever it raises is an error row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchgen.models.tokenizer import HfTokenizer
from batchgen.requests.prompts import PromptReader
from batchgen.requests.recipe import Recipe
from batchgen.types import Generation, Prompt, Row

HI = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> HfTokenizer:
    return HfTokenizer(str(tiny_llama))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": [{"role": "nobody", "content": "Hi"}]}, "role nobody is not known"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, None),  # its author's business
        ({**HI, "chat_template_kwargs": {"bos_token": [1]}}, None),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "the prompt has 6"),
        ({"messages": [{"role": "user", "content": "<|end|></s>\0\ufeff"}]}, None),
    ],
)
def test_conversations_that_it_refuses(row: dict[str, Any], sentence: str | None, tokenizer: HfTokenizer) -> None:
    rows = [Row(0, "a.jsonl", 1, HI), Row(1, "a.jsonl", 2, row), Row(2, "a.jsonl", 3, HI)]
    before, result, after = PromptReader(Recipe(), tokenizer, {}).read(rows)
    assert isinstance(before, Prompt)
    assert isinstance(after, Prompt)
    if sentence is None:
        assert isinstance(result, Prompt)
        return
    assert isinstance(result, Generation)
    assert result.error is not None
    assert result.error.message.startswith("line 2 of a.jsonl: ")
    assert sentence in result.error.message


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('never') }}", "never"),
        ("{{ 1 // 0 }}", "integer division or modulo by zero"),
        ("{{ messages[9].content.lines.words }}", "has no element 9"),
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_fails_for_every_row(template: str, sentence: str, tokenizer: HfTokenizer) -> None:
    usual, tokenizer._hf_tokenizer.chat_template = tokenizer._hf_tokenizer.chat_template, template
    try:
        results = PromptReader(Recipe(), tokenizer, {}).read([Row(0, "a.jsonl", 7, HI), Row(1, "a.jsonl", 8, HI)])
    finally:
        tokenizer._hf_tokenizer.chat_template = usual
    for line, result in zip((7, 8), results, strict=True):
        assert isinstance(result, Generation)
        assert result.error is not None
        assert result.error.type == "template"
        begin = f"line {line} of a.jsonl: the model's chat template refused these messages: "
        assert result.error.message.startswith(begin)
        assert sentence in result.error.message
