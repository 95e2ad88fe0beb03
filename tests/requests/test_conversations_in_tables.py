"""Conversations and requests from Parquet, which gives every object every key: null means "not given"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.formats.input import Input
from batchgen.requests.prompts import PromptReader
from batchgen.requests.recipe import Recipe
from batchgen.types import Generation, Prompt
from tests.byte_tokenizer import ByteTokenizer
from tests.commands.starts import write_rows


class Listening(ByteTokenizer):
    """Keeps what its chat template was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Sequence[Mapping[str, object]], dict[str, object]]] = []

    def chat(self, messages: Sequence[Mapping[str, object]], **kwargs: object) -> str:
        self.given.append((messages, kwargs))
        return "x"


def read(path: Path) -> tuple[list[Prompt | Generation], Listening]:
    source, listening = Input.open([str(path)], path.parent / "cache", scan=True), Listening()
    return PromptReader(Recipe(), listening, {}).read(list(source.rows(range(len(source))))), listening


def call(**arguments: object) -> list[dict[str, object]]:
    return [{"type": "function", "function": {"name": "f", "arguments": arguments}}]


ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "tool_calls": call(city="Bonn")},
            {"role": "tool", "content": [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
        ],
        "chat_template_kwargs": {"tools": [{"name": "f", "properties": {"city": {"type": "string"}}}]},
    },
    {
        "messages": [{"role": "assistant", "tool_calls": call(unit="C")}],
        "chat_template_kwargs": {"tools": [{"properties": {"unit": {"enum": ["C", None]}}}], "deep": {"a": 1}},
    },
]  # fmt: skip


def test_what_a_table_filled_up_is_not_given(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    outcomes, listening = read(tmp_path / "a.parquet")
    assert all(isinstance(outcome, Prompt) for outcome in outcomes), outcomes
    assert listening.given == [(row["messages"], row["chat_template_kwargs"]) for row in ROWS]
    # The columns travel along as they stand in the table.
    assert outcomes[0].columns["messages"][0]["tool_calls"] is None  # type: ignore[index]


def test_what_a_line_says_is_null_stays_where_only_the_template_knows_the_keys(tmp_path: Path) -> None:
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"id": None, **call(unit=None)[0]}]}]
    kwargs = {"tools": [{"name": "f", "default": None}], "enable_thinking": None}
    write_rows(tmp_path / "a.jsonl", [{"messages": messages, "chat_template_kwargs": kwargs}])
    _, listening = read(tmp_path / "a.jsonl")
    kept = [{"role": "assistant", "tool_calls": call(unit=None)}]
    assert listening.given == [(kept, {"tools": [{"name": "f", "default": None}]})]


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/responses"])
def test_bodies_of_a_table_are_read_like_those_of_lines(tmp_path: Path, url: str) -> None:
    key, kind = ("messages", "text") if url == "/v1/chat/completions" else ("input", "input_text")
    turns = [{"role": "user", "content": [{"type": kind, "text": "a"}]}]
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]
    bodies: list[dict[str, Any]] = [
        {key: turns, "response_format": {"type": "text"}, "logit_bias": {}, "text": {"format": {"type": "text"}}},
        {key: turns, "response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        {key: picture, "logit_bias": {"5": 1.0}, "text": {"format": {"type": "text", "name": "n"}}},
    ]
    lines = [{"custom_id": str(n), "method": "POST", "url": url, "body": body} for n, body in enumerate(bodies)]
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "a.parquet")
    (good, schema, seen), listening = read(tmp_path / "a.parquet")
    assert isinstance(good, Prompt), good
    assert listening.given == [([{"role": "user", "content": [{"type": "text", "text": "a"}]}], {})]
    assert isinstance(schema, Generation)
    assert schema.error is not None
    assert "body.response_format: schema must be an object, not null" in schema.error.message
    assert isinstance(seen, Generation)
