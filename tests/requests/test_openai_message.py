"""Answers with thinking and calls of tools: OpenAI's objects, which its own types judge, and plain rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from batchgen.requests.openai import Shape, answer
from batchgen.requests.output import renderer
from batchgen.requests.tools import NAMED, REQUIRED
from batchgen.runs.tables import write_table
from batchgen.types import Details, FinishReason, Generation, Markup, Thinking
from tests.byte_tokenizer import request
from tests.conversations import TOOL

THINK = Thinking("<think>", "</think>", is_open=False)
CALL = '<tool_call>{"name": "weather", "arguments": {"city":  "Bönn"}}</tool_call>'
ARGUMENTS = '{"city":  "Bönn"}'  # as the model wrote them
LIKE_ROW = '[TOOL_CALLS][{"name": "weather", "arguments": {}}]'


def generation(
    text: str, markup: Markup | None, reason: FinishReason = "stop", raw: str | None = None, **given: Any
) -> Generation:
    """One of a body that sets `given` beside its messages."""
    body = {"messages": [{"role": "user", "content": "Rain?"}], "tools": [TOOL], **given}
    details = None if markup is None else Details(raw_text=raw or text, reasoning_tokens=3)
    return Generation(4, "r1", text, reason, 9, 12, None, {}, request(body), details=details, markup=markup)


def chat(given: Generation, shape: Shape = "openai") -> tuple[ChatCompletion, dict[str, Any]]:
    """The answer as the openai package reads it, and as it is written."""
    written: Any = json.loads(json.dumps(answer(given, "m", 5, shape)))["response"]["body"]
    return ChatCompletion.model_validate(written, strict=True), written["choices"][0]["message"]


def test_calls_are_openais() -> None:
    body, message = chat(generation(f"<think>\nHm.</think>\n\n{CALL}\n{CALL}", Markup(THINK, "hermes")))
    [choice] = body.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    calls = choice.message.tool_calls or []
    assert [(call.type, call.function.name, call.function.arguments) for call in calls if call.type == "function"] == [
        ("function", "weather", ARGUMENTS)
    ] * 2
    assert len({call.id for call in calls}) == 2
    assert all(call.id.startswith("call_") for call in calls)
    assert message["reasoning_content"] == "Hm."
    assert "reasoning" not in message
    assert body.usage is not None
    assert body.usage.completion_tokens_details is not None
    assert body.usage.completion_tokens_details.reasoning_tokens == 3


def test_ids_of_calls_follow_from_their_row_sample_and_place() -> None:
    def ids(index: int = 4, sample: int = 0, form: str = "hermes", text: str = CALL + CALL) -> list[str]:
        given = generation(text, Markup(None, form))
        given.index, given.sample = index, sample
        return [call["id"] for call in chat(given)[1]["tool_calls"]]

    assert ids() == ids()
    assert len({*ids(), *ids(index=5), *ids(sample=1)}) == 6
    [own] = ids(form="mistral", text=LIKE_ROW)
    assert len(own) == 9
    assert own.isalnum()


# markup, text, finish reason, what the body sets, expected content, number of calls, expected finish reason
CASES: list[tuple[Markup, str, FinishReason, dict[str, Any], str | None, int, str]] = [
    (Markup(THINK, "hermes"), "<think>Hm.</think>Yes.", "stop", {}, "Yes.", 0, "stop"),
    (Markup(THINK, "hermes"), "<think>Hm.", "length", {}, None, 0, "length"),
    (Markup(THINK, "hermes"), "Yes.", "stop", {}, "Yes.", 0, "stop"),
    (Markup(None, "hermes"), f"I look. {CALL}", "stop", {}, "I look.", 1, "tool_calls"),
    (Markup(None, "hermes"), CALL + CALL, "stop", {"parallel_tool_calls": False}, None, 1, "tool_calls"),
    (Markup(None, "hermes"), CALL + CALL[:-30], "length", {}, CALL + CALL[:-30], 0, "length"),
    (Markup(None, "hermes"), CALL.removesuffix("</tool_call>"), "length", {}, None, 1, "length"),
    (Markup(None, REQUIRED), '[{"name": "weather", "parameters": {}}]', "stop", {}, None, 1, "tool_calls"),
    (Markup(None, NAMED + "weather"), ARGUMENTS, "stop", {}, None, 1, "stop"),
    (Markup(None, NAMED + "weather"), ARGUMENTS[:5], "length", {}, None, 1, "length"),
    (Markup(None, "llama3_json"), '{"name": "weather", "parameters": {}}', "stop", {}, None, 1, "tool_calls"),
    (Markup(None, "llama3_json"), '{"name": "other", "parameters": {}}', "stop", {},
     '{"name": "other", "parameters": {}}', 0, "stop"),
]  # fmt: skip


@pytest.mark.parametrize(("markup", "text", "reason", "given", "content", "calls", "expected"), CASES, ids=range(12))
def test_content_and_reason_go_with_the_calls(
    markup: Markup,
    text: str,
    reason: FinishReason,
    given: dict[str, Any],
    content: str | None,
    calls: int,
    expected: str,
) -> None:
    body, message = chat(generation(text, markup, reason, **given))
    assert (body.choices[0].message.content, body.choices[0].finish_reason) == (content, expected)
    assert len(body.choices[0].message.tool_calls or []) == calls
    assert ("tool_calls" in message) is (calls > 0)


def test_a_model_without_marks_says_what_it_says() -> None:
    body, message = chat(generation(f"<think>Hm.</think>{CALL}", None))
    assert message == {"role": "assistant", "content": f"<think>Hm.</think>{CALL}", "refusal": None}
    assert chat(generation("", None))[1]["content"] == ""
    assert body.usage is not None
    assert body.usage.completion_tokens_details is None


def test_the_shape_of_vllm_has_both_names_of_the_thinking() -> None:
    _, message = chat(generation("<think>Hm.</think>Yes.", Markup(THINK)), "vllm")
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == ("Hm.", "Hm.", "Yes.")
    _, message = chat(generation("<think>Hm.</think>Yes.", Markup(THINK), include_reasoning=False), "vllm")
    assert message == {"role": "assistant", "content": "Yes.", "refusal": None}


def test_marks_that_are_special_tokens_are_read_where_they_are_kept() -> None:
    thinking = Thinking("[THINK]", "[/THINK]", is_open=False)
    raw = "[THINK]Hm.[/THINK]" + LIKE_ROW
    text = raw.replace("[THINK]", "").replace("[/THINK]", "").replace("[TOOL_CALLS]", "")
    _, message = chat(generation(text, Markup(thinking, "mistral"), raw=raw))
    assert (message["reasoning_content"], message["content"], len(message["tool_calls"])) == ("Hm.", None, 1)
    # Other special tokens have no text, as long as the marks have one.
    _, message = chat(generation("<think>Hm.</think>Yes.", Markup(THINK), raw="<s><think>Hm.</think>Ye<pad>s."))
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")


def test_every_sample_is_split_by_itself() -> None:
    first, second = (generation(text, Markup(THINK, "hermes"), n=2) for text in ("<think>A</think>Yes.", CALL))
    second.sample, first.others = 1, [second]
    body, _ = chat(first)
    assert [(choice.message.content, choice.finish_reason) for choice in body.choices] == [
        ("Yes.", "stop"),
        (None, "tool_calls"),
    ]
    assert body.usage is not None
    assert body.usage.completion_tokens_details is not None
    assert body.usage.completion_tokens_details.reasoning_tokens == 6


def test_a_response_has_the_thinking_as_an_item_of_its_own() -> None:
    given = generation("<think>Hm.</think>Yes.", Markup(THINK))
    given.request = request({"input": "Rain?"}, "/v1/responses")
    written: Any = json.loads(json.dumps(answer(given, "m", 5, "openai")))["response"]["body"]
    body = Response.model_validate(written, strict=True)
    assert [item.type for item in body.output] == ["reasoning", "message"]
    assert body.output_text == "Yes."
    assert written["output"][0]["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert body.usage is not None
    assert body.usage.output_tokens_details.reasoning_tokens == 3


def plain(text: str, markup: Markup | None, columns: Mapping[str, object] | None = None, *others: str) -> Any:
    given = generation(text, markup)
    given.request, given.columns = None, {"id": "r1", "tools": [TOOL], **(columns or {})}
    if others:
        given.others = [generation(each, markup) for each in others]
        for each in given.others:
            each.request, each.columns = None, given.columns
    return json.loads(renderer("m", 5, "openai", False)(given))


def test_plain_rows_have_columns_for_thinking_and_calls() -> None:
    row = plain(f"<think>Hm.</think>{CALL}", Markup(THINK, "hermes"))
    assert (row["text"], row["reasoning"], row["finish_reason"]) == ("", "Hm.", "tool_calls")
    [call] = row["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": ARGUMENTS}
    row = plain("Yes.", Markup(THINK, "hermes"))
    assert (row["text"], "reasoning" in row, "tool_calls" in row) == ("Yes.", False, False)
    assert plain("<think>Hm.</think>Yes.", None)["text"] == "<think>Hm.</think>Yes."
    assert "reasoning" not in plain("<think>Hm.</think>Yes.", Markup(THINK), {"include_reasoning": False})


def test_columns_of_the_input_with_these_names_are_called_otherwise() -> None:
    row = plain("<think>Hm.</think>Yes.", Markup(THINK), {"reasoning": "mine", "tool_calls": 7})
    assert (row["reasoning"], row["input_reasoning"], row["input_tool_calls"]) == ("Hm.", "mine", 7)


def test_samples_of_plain_rows_have_lists_of_their_own() -> None:
    row = plain("<think>A</think>Yes.", Markup(THINK, "hermes"), None, CALL, "<think>B</think>No.")
    assert (row["text"], row["reasoning"]) == ("Yes.", "A")
    assert (row["texts"], row["finish_reasons"]) == (["Yes.", "", "No."], ["stop", "tool_calls", "stop"])
    assert row["texts_reasoning"] == ["A", None, "B"]
    assert [len(calls) for calls in row["texts_tool_calls"]] == [0, 1, 0]


def test_a_table_holds_calls_as_json(tmp_path: Path) -> None:
    rows = [plain(text, Markup(THINK, "hermes")) for text in ("Yes.", f"<think>Hm.</think>{CALL}")]
    for row in rows:
        del row["tools"]
    lines = [(place, json.dumps(row).encode()) for place, row in enumerate(rows)]
    write_table(tmp_path / "rows.parquet", lambda: iter(lines), "parquet", None)
    table = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [row["reasoning"] for row in table] == [None, "Hm."]
    assert table[0]["tool_calls"] is None
    assert json.loads(table[1]["tool_calls"]) == rows[1]["tool_calls"]
