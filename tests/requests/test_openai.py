"""The OpenAI batch format, in and out; answers are read back with the openai package's own types."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from batchgen.requests.openai import Shape, answer, parse
from batchgen.requests.openai_completions import CHAT, COMPLETIONS
from batchgen.requests.refusal import Refused
from batchgen.requests.row_ids import is_request
from batchgen.types import Generation, RowError

HELLO = [{"role": "user", "content": "Hello"}]


def line(body: object, url: object = CHAT, **changed: object) -> dict[str, object]:
    return {"custom_id": "r1", "method": "POST", "url": url, "body": body, **changed}


def chat(**body: object) -> dict[str, object]:
    return line({"model": "m", "messages": HELLO, **body})


def refused(value: Mapping[str, object], models: Sequence[str] = ()) -> Refused:
    with pytest.raises(Refused) as caught:
        parse(value, models)
    return caught.value


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (line({}), True),
        (line(None), True),
        ({"custom_id": 7, "url": None, "body": 1}, True),
        ({"method": "POST", "url": "/v1/completions", "body": {}}, True),
        ({"custom_id": None, "url": None, "method": None, "body": None, "prompt": "x"}, False),
        ({"custom_id": "a", "prompt": "x"}, False),
        ({"custom_id": "a", "body": "x", "prompt": "x"}, False),
        ({"url": "https://example.org", "body": "a page", "prompt": "x"}, False),
    ],
)
def test_request_lines_are_told_from_rows_with_a_body(columns: dict[str, object], expected: bool) -> None:
    assert is_request(columns) is expected


def test_chat_request() -> None:
    request = parse(chat(max_completion_tokens=5, temperature=0.5, top_p=0.9, top_k=3, seed=1, stop=["a"]))
    assert request.conversation is not None
    assert request.conversation.messages == HELLO
    assert (request.text, request.tokens, request.ignored) == (None, None, [])
    assert request.sampling == {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 1,
        "stop": ["a"],
    }


def test_what_the_body_leaves_out_is_left_to_the_run() -> None:
    assert parse(chat(temperature=None)).sampling == {}


@pytest.mark.parametrize(
    ("prompt", "text", "tokens", "further"),
    [
        ("a", "a", None, []),
        (["a"], "a", None, []),
        ([1, 2], None, [1, 2], []),
        ([[1, 2]], None, [1, 2], []),
        ([], None, [], []),
        (["a", "b", ""], "a", None, ["b", ""]),
        ([[1], [], [2, 3]], None, [1], [[], [2, 3]]),
    ],
)
def test_completion_prompts(prompt: object, text: str | None, tokens: list[int] | None, further: list[object]) -> None:
    request = parse(line({"prompt": prompt}, COMPLETIONS))
    assert (request.conversation, request.text, request.tokens, request.further) == (None, text, tokens, further)


@pytest.mark.parametrize(
    ("value", "type", "complaint"),
    [
        (line({}, custom_id=7), "wrong_type", "custom_id must be a text that is not empty, not 7"),
        (line({}, custom_id=""), "wrong_type", "custom_id must be a text"),
        (line({}, method="GET"), "wrong_type", 'method must be "POST", not "GET"'),
        (line({}, url=None), "wrong_type", "url must be a text, not null"),
        (
            line({}, url="/v1/foo"),
            "unsupported_url",
            "URL /v1/foo was used. Supported endpoints: /v1/chat/completions, /v1/completions, /v1/responses.",
        ),
        (line(None), "wrong_type", "body must be an object, not null"),
        (line({}), "missing_prompt", "body.messages is missing"),
        (line({}, COMPLETIONS), "missing_prompt", "body.prompt is missing"),
        (
            line({"prompt": ["a"] * 1025}, COMPLETIONS),
            "wrong_type",
            "body.prompt holds 1025 prompts; 1024 are the most",
        ),
        (line({"prompt": ["a", 5]}, COMPLETIONS), "wrong_type", "body.prompt[1] must be a text or a list of token ids"),
        (
            line({"prompt": ["a", [5]]}, COMPLETIONS),
            "wrong_type",
            "body.prompt[1] must be a text or a list of token ids",
        ),
        (line({"prompt": [[5], [-1]]}, COMPLETIONS), "wrong_type", "body.prompt[1] must be a text or a list of token"),
        (line({"prompt": [1, -1]}, COMPLETIONS), "wrong_type", "body.prompt must be a text or a list of token ids"),
        (line({"prompt": 7}, COMPLETIONS), "wrong_type", "body.prompt must be a text or a list of token ids, not 7"),
        (chat(stream=True), "stream", "Request must not be sent in stream mode"),
        (chat(model=7), "wrong_type", "body.model must be a text"),
        (chat(messages="x"), "wrong_type", "body.messages must be a list"),
        (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "wrong_type", "body.messages[0]:"),
        (chat(messages=[{"role": "assistant", "tool_calls": [1]}]), "wrong_type", "body.messages[0].tool_calls[0]"),
        (chat(max_tokens=1, max_completion_tokens=2), "wrong_type", "body.max_tokens is 1 but"),
        (chat(chat_template_kwargs=[]), "wrong_type", "body.chat_template_kwargs must be an object"),
    ],
)
def test_faulty_line_is_refused(value: dict[str, object], type: str, complaint: str) -> None:
    problem = refused(value)
    assert problem.type == type
    assert complaint in problem.message


@pytest.mark.parametrize(
    ("key", "neutral", "telling"),
    [
        ("best_of", [1], 2),
        ("functions", [[]], [{}]),
        ("response_format", [{"type": "text"}, {"type": "json_object"}], {"type": "grammar"}),
        ("use_beam_search", [False], True),
        ("length_penalty", [1], 2),
        ("repetition_detection", [{}], {"min_count": 2}),
        ("logits_processors", [[]], ["x"]),
        ("choice", [None], ["a"]),
        ("suffix", [None], "x"),
        ("echo", [False], True),
        ("verbosity", [None], "low"),
        ("add_special_tokens", [False], True),
    ],
)
def test_key_that_changes_the_output_is_refused_unless_neutral(
    key: str, neutral: list[object], telling: object
) -> None:
    for value in neutral:
        assert parse(chat(**{key: value})).ignored == []
    problem = refused(chat(**{key: telling}))
    assert problem.type == "unknown_parameter"
    assert problem.message.startswith(f"body.{key} is not supported")


def test_key_about_the_service_is_accepted_and_an_unknown_one_reported() -> None:
    assert parse(chat(user="u", metadata={"a": 1}, store=True, service_tier="flex", mystery=1, nil=None)).ignored == [
        "mystery"
    ]


def test_special_tokens_are_usual_for_a_completion_but_not_for_a_chat() -> None:
    assert parse(line({"prompt": "x", "add_special_tokens": True}, COMPLETIONS)).text == "x"
    assert refused(line({"prompt": "x", "add_special_tokens": False}, COMPLETIONS)).type == "unknown_parameter"


def test_equal_limits_are_one_limit() -> None:
    assert parse(chat(max_tokens=3, max_completion_tokens=3)).sampling == {"max_new_tokens": 3}


def test_body_must_name_the_runs_model_or_none() -> None:
    parse(chat(), ("m",))
    parse(line({"messages": HELLO}), ("m",))
    problem = refused(chat(), ("other",))
    sentence = 'body.model is "m", but this run\'s model is "other": write that into the body, '
    sentence += "or give the name that the lines use with --served-model-name"
    assert (problem.type, problem.message) == ("model_not_found", sentence)


def test_a_list_that_is_refused_is_not_told_to_be_a_list() -> None:
    problem = refused(chat(functions=[{"name": "f"}]))
    assert (
        problem.message == "body.functions is not supported: it must be [] or left out; body.tools has taken its place"
    )
    assert "not a list" not in problem.message
    assert "it must be 1 or left out, not 2" in refused(chat(best_of=2)).message
    assert parse(chat(best_of=2, n=2)).sampling == {"n": 2}


def done(request: Mapping[str, object] | None = None, **changed: object) -> Generation:
    return Generation(4, "r1", "Hi ü", "stop", 9, 12, None, {}, chat() if request is None else request)


def failed(type: str, message: str, request: Mapping[str, object] | None) -> Generation:
    return Generation(4, "r1", None, None, 0, 0, RowError(type, f"line 5 of in.jsonl: {message}", 5), {}, request)


@pytest.mark.parametrize("shape", ["openai", "vllm"])
def test_answer_to_a_chat_parses_with_the_openai_package(shape: Shape) -> None:
    written = json.loads(json.dumps(answer(done(), "m", 1763860000, shape)))
    assert list(written) == ["id", "custom_id", "response", "error"]
    assert (written["custom_id"], written["error"], written["response"]["status_code"]) == ("r1", None, 200)
    body = ChatCompletion.model_validate(written["response"]["body"], strict=True)
    assert (body.choices[0].message.content, body.choices[0].finish_reason) == ("Hi ü", "stop")
    assert (body.model, body.created, body.object) == ("m", 1763860000, "chat.completion")
    assert body.usage is not None
    assert (body.usage.prompt_tokens, body.usage.completion_tokens, body.usage.total_tokens) == (9, 12, 21)


@pytest.mark.parametrize("shape", ["openai", "vllm"])
def test_answer_to_a_completion_parses_with_the_openai_package(shape: Shape) -> None:
    written = answer(done(line({"prompt": "x"}, COMPLETIONS)), "m", 1763860000, shape)
    response = json.loads(json.dumps(written))["response"]
    body = Completion.model_validate(response["body"], strict=True)
    assert (body.choices[0].text, body.choices[0].finish_reason, body.object) == ("Hi ü", "stop", "text_completion")


def test_answer_names_follow_each_shape() -> None:
    vllm, openai = (answer(done(), "m", 1, shape) for shape in ("vllm", "openai"))
    assert str(vllm["id"]).startswith("vllm-")
    assert str(openai["id"]).startswith("batch_req_")
    response = vllm["response"]
    assert isinstance(response, dict)
    assert response["request_id"].startswith("vllm-batch-")
    assert len(str(vllm["id"])) == len("vllm-") + 32


def test_answer_is_the_same_after_a_resume_and_differs_by_row() -> None:
    assert answer(done(), "m", 1, "vllm") == answer(done(), "m", 1, "vllm")
    other = Generation(5, "r1", "Hi ü", "stop", 9, 12, None, {}, chat())
    assert answer(other, "m", 1, "vllm")["id"] != answer(done(), "m", 1, "vllm")["id"]


@pytest.mark.parametrize(
    ("type", "message", "status", "kind", "param", "code"),
    [
        (
            "unknown_parameter",
            "body.best_of is not supported",
            400,
            "invalid_request_error",
            "best_of",
            "unknown_parameter",
        ),
        ("too_long", "the prompt has 7 tokens", 400, "invalid_request_error", None, "context_length_exceeded"),
        ("model_not_found", "body.model is", 404, "invalid_request_error", "model", "model_not_found"),
        ("out_of_memory", "it does not fit", 500, "server_error", None, "out_of_memory"),
        ("stream", "Request must not be sent in stream mode", 400, "invalid_request_error", None, "stream"),
    ],
)
def test_openai_shape_of_an_error(
    type: str, message: str, status: int, kind: str, param: str | None, code: str
) -> None:
    written = answer(failed(type, message, chat()), "m", 1, "openai")
    response = written["response"]
    assert isinstance(response, dict)
    assert (written["custom_id"], written["error"], response["status_code"]) == ("r1", None, status)
    sentence = f"line 5 of in.jsonl: {message}"
    assert response["body"] == {"error": {"message": sentence, "type": kind, "param": param, "code": code}}


@pytest.mark.parametrize(
    ("type", "message", "status", "kind", "param"),
    [
        ("unknown_parameter", "body.best_of is not supported", 400, "BadRequestError", "best_of"),
        ("model_not_found", "body.model is", 404, "NotFoundError", "model"),
        ("out_of_memory", "it does not fit", 500, "InternalServerError", None),
    ],
)
def test_vllm_shape_of_an_error(type: str, message: str, status: int, kind: str, param: str | None) -> None:
    written = answer(failed(type, message, chat()), "m", 1, "vllm")
    response = written["response"]
    assert isinstance(response, dict)
    assert (response["status_code"], response["body"]) == (status, None)
    sentence = f"line 5 of in.jsonl: {message}"
    assert written["error"] == {"error": {"message": sentence, "type": kind, "param": param, "code": status}}


def test_vllm_shape_of_a_refused_url_and_of_stream_mode_is_a_text() -> None:
    url = answer(failed("unsupported_url", "URL …", line({}, "/v1/foo")), "m", 1, "vllm")
    assert (
        url["error"]
        == "URL /v1/foo was used. Supported endpoints: /v1/chat/completions, /v1/completions, /v1/responses."
    )
    assert answer(failed("stream", "…", chat(stream=True)), "m", 1, "vllm")["error"] == (
        "Request must not be sent in stream mode"
    )


@pytest.mark.parametrize("request_line", [None, line({}, custom_id=[7]), {"prompt": "x"}])
def test_line_without_a_custom_id_is_named_after_its_number(request_line: dict[str, object] | None) -> None:
    written = answer(failed("malformed_json", "is no JSON", request_line), "m", 1, "openai")
    assert written["custom_id"] == "line-5"
