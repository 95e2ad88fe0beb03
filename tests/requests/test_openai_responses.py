"""Lines for /v1/responses, in and out; answers are read back with the openai package's own type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import Response, ResponseOutputMessage, ResponseOutputText

from batchgen import RunSettings
from batchgen.requests.openai import answer, parse
from batchgen.requests.openai_responses import RESPONSES
from batchgen.requests.recipe import Recipe
from batchgen.requests.refusal import Refused
from batchgen.runs.flow import Host, run
from batchgen.types import Alternative, Details, Generation
from tests.byte_tokenizer import request
from tests.commands.starts import ENVIRONMENT, read_rows, write_rows

USER = {"role": "user", "content": "Hello"}


def line(**body: object) -> dict[str, object]:
    return request(body, url=RESPONSES)


def parts(kind: str, *texts: str) -> list[dict[str, object]]:
    return [{"type": kind, "text": text} for text in texts]


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ({"input": "Hello"}, [USER]),
        ({"input": [USER]}, [USER]),
        ({"input": [{"type": "message", "status": None, **USER}], "instructions": None}, [USER]),
        ({"input": "Hello", "instructions": "Be brief."}, [{"role": "system", "content": "Be brief."}, USER]),
        (
            {"input": [{"role": "user", "content": parts("input_text", "a", "b")}]},
            [{"role": "user", "content": parts("text", "a", "b")}],
        ),
        (
            {
                "input": [
                    {"role": "developer", "content": "Be brief."},
                    USER,
                    {"type": "message", "role": "assistant", "id": "msg_1", "content": parts("output_text", "Hi")},
                    USER,
                ]
            },
            [
                {"role": "developer", "content": "Be brief."},
                USER,
                {"role": "assistant", "content": parts("text", "Hi")},
                USER,
            ],
        ),
    ],
)
def test_input_is_a_conversation(body: dict[str, Any], messages: list[dict[str, object]]) -> None:
    asked = parse(line(**body))
    assert asked.conversation is not None
    assert (asked.conversation.messages, asked.text, asked.tokens, asked.ignored) == (messages, None, None, [])


def test_sampling_and_what_changes_nothing() -> None:
    neutral = {"tools": [], "tool_choice": "auto", "background": False, "previous_response_id": None, "store": True}
    neutral |= {"text": {"format": {"type": "text"}}, "truncation": "disabled", "reasoning": {"effort": None}}
    neutral |= {"metadata": {"a": "b"}, "include": [], "user": "u", "parallel_tool_calls": True, "top_logprobs": 0}
    asked = parse(line(input="x", max_output_tokens=7, temperature=0.5, top_p=0.9, **neutral))
    expected = {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "n": 1, "top_logprobs": 0, "constraint": None}
    assert asked.sampling == expected
    assert asked.spelled["max_new_tokens"] == "body.max_output_tokens"
    assert asked.ignored == []


@pytest.mark.parametrize(
    ("body", "type", "complaint"),
    [
        ({}, "missing_prompt", "body.input is missing"),
        ({"input": []}, "wrong_type", "body.input must be a text or a list of messages, not an empty list"),
        ({"input": ["x"]}, "wrong_type", "body.input[0] must be an object with role and content"),
        ({"input": "x", "instructions": 7}, "wrong_type", "body.instructions must be a text, not 7"),
        ({"input": [{"role": "tool", "content": "x"}]}, "wrong_type", "body.input[0]: role must be one of user,"),
        ({"input": [USER, {"role": "user"}]}, "wrong_type", "body.input[1]: content must be a text or a list"),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]},
            "unknown_parameter",
            'body.input[0]: only items of type "message" are supported, not "function_call_output"',
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "wrong_type",
            'content may hold parts of type "input_text" only, not "input_image": images are not supported yet',
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "wrong_type",
            "audio is not supported yet",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "wrong_type", "files are not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "wrong_type", "must be a text, not null"),
        ({"tools": [{"type": "web_search"}]}, "unknown_parameter", "body.tools is not supported"),
        ({"tool_choice": "required"}, "unknown_parameter", "body.tool_choice is not supported"),
        ({"previous_response_id": "resp_1"}, "unknown_parameter", "body.previous_response_id is not supported"),
        ({"conversation": "c"}, "unknown_parameter", "body.conversation is not supported"),
        ({"prompt": {"id": "p"}}, "unknown_parameter", "body.prompt is not supported"),
        ({"background": True}, "unknown_parameter", "body.background is not supported"),
        ({"reasoning": {"effort": "low"}}, "unknown_parameter", "body.reasoning is not supported"),
        ({"text": {"format": {"type": "json_schema"}}}, "wrong_type", "body.text: the name of the schema must be 1 to"),
        ({"text": {"verbosity": "low"}}, "unknown_parameter", 'body.text is not supported with "verbosity"'),
        ({"n": 2}, "unknown_parameter", "body.n is not supported: it must be 1 or left out, not 2"),
        ({"truncation": "auto"}, "unknown_parameter", "body.truncation is not supported"),
        ({"include": ["reasoning.encrypted_content"]}, "unknown_parameter", "body.include is not supported"),
        ({"stream": True}, "stream", "stream mode"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(body: dict[str, Any], type: str, complaint: str) -> None:
    with pytest.raises(Refused) as caught:
        parse(line(**(body if "input" in body or not body else {"input": "x", **body})))
    assert caught.value.type == type
    assert complaint in caught.value.message


@pytest.mark.parametrize(("reason", "status"), [("stop", "completed"), ("length", "incomplete")])
def test_the_answer_is_openais_response(reason: Any, status: str) -> None:
    asked = line(input="x", instructions="Be brief.", max_output_tokens=12, temperature=0.5, metadata={"a": "b"})
    made = Generation(4, "r1", "Hi ü", reason, 9, 12, None, {}, asked)
    written = json.loads(json.dumps(answer(made, "m", 1763860000, "openai")))
    assert (written["custom_id"], written["error"], written["response"]["status_code"]) == ("r1", None, 200)
    body = Response.model_validate(written["response"]["body"], strict=True)
    assert (body.object, body.status, body.model, body.created_at) == ("response", status, "m", 1763860000)
    assert (body.output_text, body.id[:5], body.error) == ("Hi ü", "resp_", None)
    assert (body.instructions, body.max_output_tokens, body.temperature) == ("Be brief.", 12, 0.5)
    assert body.metadata == {"a": "b"}
    assert (None if body.incomplete_details is None else body.incomplete_details.reason) == (
        None if status == "completed" else "max_output_tokens"
    )
    [message] = body.output
    assert isinstance(message, ResponseOutputMessage)
    assert (message.role, message.status) == ("assistant", status)
    [text] = message.content
    assert isinstance(text, ResponseOutputText)
    assert (text.annotations, text.logprobs) == ([], None)
    assert body.usage is not None
    assert (body.usage.input_tokens, body.usage.output_tokens, body.usage.total_tokens) == (9, 12, 21)
    assert answer(made, "m", 1763860000, "vllm")["response"] != answer(made, "m", 1763860000, "openai")["response"]


def test_logprobs_come_where_they_are_included() -> None:
    asked = line(input="x", include=["message.output_text.logprobs"])
    assert parse(asked).sampling == {"logprobs": True, "n": 1}
    assert parse(line(input="x", top_logprobs=2)).sampling == {"logprobs": True, "top_logprobs": 2, "n": 1}
    likeliest = [[Alternative(7, "\udcc3", -0.25, 1)], []]
    details = Details(token_texts=["H", "i"], top_logprobs=likeliest)
    made = Generation(4, "r1", "Hi", "stop", 1, 2, None, {}, asked, [-0.5, -1.0], details)
    written: Any = answer(made, "m", 1, "openai")["response"]
    [text] = Response.model_validate(written["body"], strict=True).output[0].content  # type: ignore[union-attr]
    assert isinstance(text, ResponseOutputText)
    assert [(one.token, one.logprob) for one in text.logprobs or []] == [("H", -0.5), ("i", -1.0)]
    [other] = (text.logprobs or [])[0].top_logprobs
    assert (other.token, other.bytes, other.logprob) == ("\ufffd", [0xC3], -0.25)


def test_a_run_answers_such_lines(tmp_path: Path) -> None:
    rows = [
        {**line(model="m", input="Hi", instructions="Be brief.", max_output_tokens=99), "custom_id": "a"},
        {**line(model="m", input=[{"role": "user", "content": parts("input_text", "x", "y")}]), "custom_id": "b"},
        {**line(model="m", input="Hi", tools=[{"type": "web_search"}]), "custom_id": "c"},
    ]
    path = write_rows(tmp_path / "in.jsonl", rows)
    status = run(
        str(path), tmp_path / "out", RunSettings(recipe=Recipe(model="m"), engine="echo"), host=Host(ENVIRONMENT)
    )
    assert (status.good, status.failed) == (2, 1)
    first, second, third = (row["response"] for row in read_rows(tmp_path / "out" / "generations.jsonl"))
    assert Response.model_validate(first["body"]).output_text == "system: Be brief.\nuser: Hi\n"
    assert Response.model_validate(second["body"]).output_text == "user: x\ny\n"
    assert (third["status_code"], third["body"]["error"]["param"]) == (400, "tools")
