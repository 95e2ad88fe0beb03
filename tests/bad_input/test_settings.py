"""What rows and OpenAI lines may not ask for, and templates that fail, and rows that ask a template for too much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batchgen.requests.sandbox import MAX_CHARACTERS
from tests.bad_input.command import answered, call, lines

# What a row sets, and the sentence behind "line N of a.jsonl: "; None where it is good.
SAMPLING: list[tuple[dict[str, Any], str | None]] = [
    ({"temperature": "hot"}, 'temperature must be a number from 0 to 100, not "hot"'),
    ({"temperature": -1}, "temperature must be a number from 0 to 100, not -1"),
    ({"temperature": 101}, "temperature must be a number from 0 to 100, not 101"),
    ({"temperature": True}, "temperature must be a number from 0 to 100, not true"),
    ({"temperature": 10**400}, "temperature must be a number from 0 to 100, not a number of many digits"),
    ({"temperature": [1]}, "temperature must be a number from 0 to 100, not a list"),
    ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, 1 or more, not 0"),
    ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number, 1 or more, not 1.5"),
    ({"max_new_tokens": "8"}, 'max_new_tokens must be a whole number, 1 or more, not "8"'),
    ({"max_new_tokens": 1e9}, None),  # the echo ends with its prompt; a model's context would be the limit
    ({"max_new_tokens": 10**400}, "max_new_tokens must be below 2147483648, not a number of many digits"),
    ({"top_k": 1e20}, "top_k must be below 2147483648, not 1e+20"),
    ({"top_p": 0}, "top_p must be a number above 0 and at most 1, not 0"),
    ({"top_p": False}, "top_p must be a number above 0 and at most 1, not false"),
    ({"top_k": -1, "seed": -1}, None),  # off and not given, as with vLLM
    ({"top_k": -2}, "top_k must be a whole number, 0 (off) or more, not -2"),
    ({"seed": "7"}, 'seed must be a whole number, not "7"'),
    ({"seed": 10**400}, None),
    ({"stop": [f"stop {number}" for number in range(5000)]}, None),
    ({"stop": ["a", ""]}, 'stop must be a text or a list of texts, none of them empty, not ["a", ""]'),
    ({"stop": 5}, "stop must be a text or a list of texts, none of them empty, not 5"),
    ({"stop": {"a": 1}}, "stop must be a text or a list of texts, none of them empty, not an object"),
    ({"logprobs": 1}, "logprobs must be true or false, not 1"),
    ({"temperature": None, "stop": None, "seed": None}, None),
    ({"stream": True, "tools": [1], "colour": "red"}, None),  # columns of a row, which mean nothing here
    ({"n": 1.0, "min_p": 0, "min_tokens": 3.0, "logit_bias": {"5": -100}, "stop_token_ids": [255]}, None),
    ({"n": 0}, "n must be a whole number from 1 to 1024, not 0"),
    ({"n": 1025}, "n must be a whole number from 1 to 1024, not 1025"),
    ({"n": "2"}, 'n must be a whole number from 1 to 1024, not "2"'),
    ({"min_p": 1.5}, "min_p must be a number from 0 (off) to 1, not 1.5"),
    ({"repetition_penalty": 0}, "repetition_penalty must be a number from 0.01 to 100, not 0"),
    ({"presence_penalty": 3}, "presence_penalty must be a number from -2 to 2, not 3"),
    ({"frequency_penalty": None}, None),
    ({"logit_bias": [5]}, "logit_bias must be an object from token ids to numbers from -100 to 100, not a list"),
    ({"logit_bias": {"a": 1}}, 'logit_bias: the key "a" is no token id'),
    ({"logit_bias": {"5": 101}}, "logit_bias: the bias of token 5 must be from -100 to 100, not 101"),
    ({"logit_bias": {"256": 1}}, "logit_bias has token 256, but the model has 256 tokens"),
    ({"allowed_token_ids": [1, 999]}, "allowed_token_ids has token 999, but the model has 256 tokens"),
    ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, not 5"),
    ({"bad_words": "a"}, 'bad_words must be a list of texts, none of them empty, not "a"'),
    ({"min_tokens": 9, "max_new_tokens": 8}, "min_tokens must be at most 8, as many as may be generated, not 9"),
    ({"ignore_eos": 1}, "ignore_eos must be true or false, not 1"),
    ({"top_logprobs": 21}, "top_logprobs must be a whole number from 0 to 20, not 21"),
    ({"prompt_logprobs": -1}, "prompt_logprobs must be a whole number from 0 to 20, not -1"),
    ({"regex": "a+", "choice": ["a"]}, "regex and choice both say what the text must be; give one of them"),
    ({"json_schema": []}, "json_schema must be a JSON schema, an object or its JSON text, not an empty list"),
    (
        {"json_schema": "{"},
        "json_schema is no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    (
        {"json_schema": {"uniqueItems": True}},
        "json_schema: the schema uses uniqueItems, which cannot be enforced; leave it out",
    ),
    (
        {"json_schema": {"not": {}, "contains": {}}},
        "json_schema: the schema uses contains and not, which cannot be enforced; leave them out",
    ),
    (
        {"regex": "a(?=b)"},
        "regex: the regular expression cannot be enforced: look-around, including look-ahead and look-behind, is not "
        "supported",
    ),
    ({"choice": "a"}, 'choice must be a list of texts, none of them empty, not "a"'),
    ({"grammar": "start: x"}, 'grammar: the grammar cannot be enforced: line 1, column 8: unknown name: "x"'),
]


def test_what_a_row_may_not_ask_for_is_an_error_row(tmp_path: Path) -> None:
    rows = [{"prompt": "p", **own} for own, _ in SAMPLING]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = call(tmp_path, "run", "a.jsonl", "-o", "out", "--engine", "echo")
    assert ended.code == 3, ended.err
    for number, (row, (_, sentence)) in enumerate(zip(answered(tmp_path / "out"), SAMPLING, strict=True), 1):
        if sentence is None:
            assert (row["error"], row["text"]) == (None, "p")
        else:
            assert row["error"]["message"] == f"line {number} of a.jsonl: {sentence}"


HI = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def chat(**body: Any) -> dict[str, Any]:
    return {"method": "POST", "url": CHAT, "body": {"model": "m", "messages": HI, **body}}


def completion(prompt: Any, **body: Any) -> dict[str, Any]:
    return {"method": "POST", "url": COMPLETION, "body": {"prompt": prompt, **body}}


# A line without its custom_id, OpenAI's code, and what the message says; None where it is answered.
REQUESTS: list[tuple[dict[str, Any], str | None, str]] = [
    (chat(), None, ""),
    (completion("p"), None, ""),
    (completion([104, 105]), None, ""),
    (chat(n=1, stream=False, tools=[], logit_bias={}, user="u", mystery=1), None, ""),
    (chat(max_tokens=1e9), None, ""),
    ({"method": "POST", "url": CHAT, "body": []}, "wrong_type", "body must be an object, not an empty list"),
    ({"method": "POST", "url": CHAT, "body": None}, "wrong_type", "body must be an object, not null"),
    ({"method": "POST", "url": CHAT}, "wrong_type", "body must be an object, not null"),
    ({**chat(), "method": "GET"}, "wrong_type", 'method must be "POST", not "GET"'),
    ({**chat(), "url": "/v1/embeddings"}, "unsupported_url", "URL /v1/embeddings was used. Supported endpoints: "),
    ({**chat(), "url": 7}, "wrong_type", "url must be a text, not 7"),
    ({**chat(), "custom_id": 7}, "wrong_type", "custom_id must be a text that is not empty, not 7"),
    ({**chat(), "custom_id": ""}, "wrong_type", 'custom_id must be a text that is not empty, not ""'),
    (chat(model="other"), "model_not_found", 'body.model is "other", but this run\'s model is "m"'),
    (chat(model=["m"]), "wrong_type", "body.model must be a text, not a list"),
    (chat(stream=True), "stream", "Request must not be sent in stream mode"),
    (chat(stream="yes"), "stream", "Request must not be sent in stream mode"),
    (chat(n=0), "wrong_type", "body.n must be a whole number from 1 to 1024, not 0"),
    (chat(best_of=2), "unknown_parameter", "body.best_of is not supported: it must be 1 or left out, not 2; or as"),
    (chat(logit_bias={"256": 1}), "wrong_type", "body.logit_bias has token 256, but the model has 256 tokens"),
    (chat(tools=[{"type": "function"}]), "wrong_type", "body.tools[0]: function must be an object with"),
    (chat(tools=[{"type": "web_search"}]), "unknown_parameter", 'body.tools[0]: type must be "function", not "web_'),
    (chat(tool_choice="required"), "wrong_type", "body.tool_choice needs body.tools, and there are none"),
    (chat(functions=[{"name": "f"}]), "unknown_parameter", "body.functions is not supported: it must be [] or left"),
    (chat(reasoning_effort="huge"), "wrong_type", "body.reasoning_effort must be one of none, minimal, low, medium"),
    (chat(continue_final_message=True), "wrong_type", "body.continue_final_message needs a last message of the role"),
    (chat(chat_template="x"), "template", "start the run with --trust-templates to have it rendered"),
    (chat(response_format={"type": "xml"}), "unknown_parameter", "body.response_format is not supported: its type"),
    (chat(guided_json={"not": {}}), "constraint", "body.guided_json: the schema uses not, which cannot be"),
    (chat(logprobs=5), "wrong_type", "body.logprobs must be true or false, not 5; top_logprobs says how many"),
    (chat(top_logprobs=5), "wrong_type", "body.top_logprobs needs body.logprobs, which must be true"),
    (completion("p", logprobs=21), "wrong_type", "body.logprobs must be a whole number from 0 to 20, not 21"),
    (completion("p", max_tokens=0), "wrong_type", "body.max_tokens must be a whole number, 1 or more, not 0"),
    (completion("p", truncate_prompt_tokens=0), "wrong_type", "body.truncate_prompt_tokens must be a whole number"),
    (completion("p", truncation_side="up"), "wrong_type", 'body.truncation_side must be "left" or "right", not "up"'),
    (chat(temperature="hot"), "wrong_type", 'body.temperature must be a number from 0 to 100, not "hot"'),
    (chat(max_tokens=0), "wrong_type", "body.max_tokens must be a whole number, 1 or more, not 0"),
    (chat(max_tokens=1, max_completion_tokens=2), "wrong_type", "body.max_tokens is 1 but body.max_comp"),
    (chat(stop=["", "x"]), "wrong_type", "body.stop must be a text or a list of texts"),
    (chat(messages=None), "missing_prompt", "body.messages is missing"),
    (chat(messages="Hi"), "wrong_type", 'body.messages must be a list of messages, not "Hi"'),
    (chat(messages=[]), "wrong_type", "body.messages must be a list of messages, not an empty list"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), "wrong_type",
     'body.messages[0]: content may hold parts of type "text" only, not "image_url"'),
    (chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "wrong_type", "must be a text, not null"),
    (chat(messages=[{"role": 5, "content": "a"}]), "wrong_type", "body.messages[0]: role must be a text, not 5"),
    (chat(messages=[{"role": "assistant", "tool_calls": [{}]}]), "wrong_type", "messages[0].tool_calls[0] must be"),
    (chat(messages=[*HI, HI]), "wrong_type", "body.messages[1] must be an object with role and content, not a list"),
    (completion(None), "missing_prompt", "body.prompt is missing"),
    (completion(""), "empty_prompt", "the prompt is empty: it has no tokens"),
    (completion(["a", "b"]), None, ""),
    (completion(["a", ""]), "empty_prompt", "body.prompt[1]: the prompt is empty: it has no tokens"),
    (completion([[97], [256]]), "wrong_type", "body.prompt[1]: body.prompt has token 256, but the model has"),
    (completion([1, -1]), "wrong_type", "body.prompt must be a text or a list of token ids, not a list"),
    (completion([256]), "wrong_type", "body.prompt has token 256, but the model has 256 tokens"),
    (completion([10**400]), "wrong_type", "body.prompt has token a number of many digits"),
    ({"prompt": "no request"}, "wrong_type", "method, url and body are missing: a line needs custom_id, method"),
    ({"custom_id": "chat-0", **chat()}, "duplicate_id", 'the id "chat-0" is that of line 1 of a.jsonl'),
]  # fmt: skip


@pytest.mark.parametrize("shape", ["openai", "vllm"])
def test_every_openai_line_is_answered_in_its_place(shape: str, tmp_path: Path) -> None:
    rows = [{"custom_id": f"chat-{number}", **line} for number, (line, _, _) in enumerate(REQUESTS)]
    text = [json.dumps(row) for row in rows] + ["{broken", "[]", '{"custom_id":"a","custom_id":"b"}']
    (tmp_path / "a.jsonl").write_text("".join(f"{line}\n" for line in text))
    command = ("run-batch", "-i", "a.jsonl", "-o", "out.jsonl", "--model", "m", "--engine", "echo")
    ended = call(tmp_path, *command, "--error-format", shape)
    assert (ended.code, ended.out) == (3, "out.jsonl\n"), ended.err
    assert 'the body\'s key "mystery" is not known to batchgen and is ignored' in ended.err
    answers = [json.loads(line) for line in lines(tmp_path / "out.jsonl")]
    assert len(answers) == len(text)
    for number, (answer, row) in enumerate(zip(answers, rows, strict=False)):
        own = row["custom_id"]
        assert answer["custom_id"] == (str(own) if own else f"line-{number + 1}")
        _, code, sentence = REQUESTS[number]
        if code is None:
            assert (answer["response"]["status_code"], answer["error"]) == (200, None), answer
            continue
        assert answer["response"]["status_code"] == (404 if code == "model_not_found" else 400)
        if shape == "openai":
            error = answer["response"]["body"]["error"]
            assert (error["code"], error["type"]) == (code, "invalid_request_error")
            assert error["message"].startswith(f"line {number + 1} of a.jsonl: ")
        assert sentence in json.dumps(answer, ensure_ascii=False).replace('\\"', '"')
    assert [answer["custom_id"] for answer in answers[-3:]] == [f"line-{len(text) - back}" for back in (2, 1, 0)]
    assert f"line {len(text)} of a.jsonl is not valid JSON: an object has the key" in json.dumps(answers[-1])


TEXT = f"it makes a text of more than {MAX_CHARACTERS} characters"

# A template, and what becomes of {"prompt":"p","n":3,"many":10**9,"list":[1,2],"none":null}.
TEMPLATES = [
    ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    ("{% block a %}{{ self.a() }}{% endblock %}", "maximum recursion depth exceeded"),
    ("{% for i in range(99999) %}{{ 'x' * 20000 }}{% endfor %}", TEXT),
    ("{{ prompt * many }}", TEXT),
    ("{{ [0] * n * many }}", TEXT),
    ("{{ n ** many }}", "a power has more than 10000 bits"),
    ("{{ prompt|center(many) }}", "it fills a text up to more than 1000000 characters"),
    ("{{ prompt|indent(width=many) }}", "it fills a text up to more than 1000000 characters"),
    ("{{ prompt.ljust(many) }}", "it fills a text up to more than 1000000 characters"),
    ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    ("{{ '{0.__class__}'.format(prompt) }}", "access to attribute '__class__' of 'str' object is unsafe"),
    ("{{ list.append(3) }}", "access to attribute 'append' of 'list' object is unsafe"),
    ("{{ lipsum() }}", "'lipsum' is undefined"),
    ("{% include 'other' %}", "no loader for this environment"),
    ("{{ absent }}", "'absent' is undefined"),
    ("{{ none }}{{ list[9] }}", "it writes a column that is null"),
    ("{{ 1 // 0 }}", "integer division or modulo by zero"),
    ("{{ prompt() }}", "'str' object is not callable"),
    ("{{ '\\ud800' }}", None),
]  # fmt: skip


@pytest.mark.parametrize(("template", "sentence"), TEMPLATES, ids=lambda value: str(value)[:40])
def test_a_template_that_fails_or_a_row_that_asks_it_for_too_much_is_an_error_row(
    template: str, sentence: str | None, tmp_path: Path
) -> None:
    row = {"id": "a", "prompt": "p", "n": 3, "many": 10**9, "list": [1, 2], "none": None}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n{\n")
    ended = call(tmp_path, "run", "a.jsonl", "-o", "out", "--engine", "echo", "--template", template)
    assert ended.code == 3, ended.err
    first, _ = answered(tmp_path / "out")
    message = first["error"]["message"]
    assert {name: first[name] for name in row} == row
    if sentence is None:
        assert message == "line 1 of a.jsonl: the prompt holds half of a surrogate pair, which is no text"
    else:
        assert message.startswith("line 1 of a.jsonl: the template failed: ")
        assert sentence in message


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% if %}", "--template is no Jinja template: line 1: "),
        ("{{ prompt", "--template is no Jinja template: line 1: "),
        ("{{ prompt|random }}", "--template is no Jinja template: line 1: No filter named 'random'"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "--template cannot be used: maximum recursion depth exceeded"),
        ("{% for a in b %}" * 30 + "{% endfor %}" * 30, "--template cannot be used: too many statically nested blocks"),
        ("{{ " + "9" * 5000 + " }}", "--template cannot be used: Exceeds the limit"),
    ],
    ids=lambda value: value[:20],
)
def test_a_template_that_is_none_is_refused(template: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt":"p"}\n')
    ended = call(tmp_path, "run", "a.jsonl", "-o", "out", "--engine", "echo", "--template", template)
    assert (ended.code, ended.out) == (4, ""), ended
    assert sentence in ended.err
    assert "Traceback" not in ended.err


def test_templates_that_only_look_hostile_are_rendered(tmp_path: Path) -> None:
    template = (
        "{% for a in list %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ a ~ '-' ~ prompt }} {% endfor %}"
        "{{ '* 1234567 %05d|%s' % (7, prompt) }}{{ prompt|center(5) }}{{ 'a' * n + prompt }}{{ 2**n }}"
        "{{ '{0:>3} 1234567'.format(prompt) }}{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}"
    )
    (tmp_path / "a.jsonl").write_text('{"prompt":"p","n":3,"list":[1,2]}\n')
    ended = call(tmp_path, "run", "a.jsonl", "-o", "out", "--engine", "echo", "--template", template)
    assert ended.code == 0, ended.err
    (row,) = answered(tmp_path / "out")
    assert row["text"] == "1/2False1-p 2/2True2-p * 1234567 00007|p  p  aaap8  p 1234567a1"
