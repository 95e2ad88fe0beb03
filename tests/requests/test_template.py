"""What chat templates and `--template` are given, and what they refuse."""

from __future__ import annotations

import pytest

from batchgen.requests.refusal import Refused
from batchgen.requests.template import compile_template, conversation, template_kwargs, without_nulls


def test_parts_of_a_message_stay_parts_and_nulls_are_left_out() -> None:
    given = [{"type": "text", "text": "a", "image_url": None}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": given, "name": None}]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert conversation(messages, "messages", whole=True) == [{"role": "user", "content": parts}]


def test_null_is_not_given_where_the_keys_of_a_call_are_known_but_what_it_passes_on_stays() -> None:
    function = {"name": "f", "arguments": {"a": None}, "description": None}
    call = {"id": None, "type": "function", "function": function}
    [message] = conversation([{"role": "assistant", "content": "", "tool_calls": [call]}], "messages", whole=True)
    kept = {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    assert message == {"role": "assistant", "content": "", "tool_calls": [kept]}


def test_an_empty_list_of_calls_is_no_call() -> None:
    for whole in (True, False):
        given = [{"role": "assistant", "content": "Hi", "tool_calls": []}]
        assert conversation(given, "messages", whole=whole) == [{"role": "assistant", "content": "Hi"}]


def test_without_nulls_reaches_every_depth_but_keeps_the_nulls_of_a_list() -> None:
    given = {"a": None, "b": [{"c": None, "d": 0}, None], "e": {"f": {"g": None}}}
    assert without_nulls(given) == {"b": [{"d": 0}, None], "e": {"f": {}}}


def test_call_of_a_tool_needs_no_content_and_is_left_as_it_is() -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    assert conversation([{**call, "content": None}], "messages", whole=True) == [call]
    with pytest.raises(Refused, match=r"tool_calls\[0\] must be an object with id, type and function") as caught:
        conversation([call], "body.messages", whole=False)
    assert caught.value.type == "wrong_type"
    openai_call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [openai_call]}
    assert conversation([message], "body.messages", whole=False) == [{"role": "assistant", "tool_calls": [openai_call]}]


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hello", 'messages must be a list of messages, not "hello"'),
        ([], "messages must be a list of messages, not an empty list"),
        (["hello"], "messages[0] must be an object with role and content"),
        ([{"content": "x"}], "messages[0]: role must be a text, not null"),
        ([{"role": "user"}], "messages[0]: content must be a text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], 'parts of type "text" only, not "image_url"'),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            'content may hold parts of type "text" only, not "image_url": images are not supported yet',
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], "images are not supported yet"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "audio is not supported yet"),
        ([{"role": "user", "content": [{"type": "video_url"}]}], "videos are not supported yet"),
        ([{"role": "user", "content": [{"type": "file"}]}], "files are not supported yet"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], 'of type "text" must be a text, not 5'),
        ([{"role": "user", "content": ["x"]}], 'parts of type "text" only'),
    ],
)
def test_messages_of_another_shape_are_refused(messages: object, complaint: str) -> None:
    with pytest.raises(Refused) as caught:
        conversation(messages, "messages", whole=True)
    assert caught.value.type == "wrong_type"
    assert complaint in caught.value.message


@pytest.mark.parametrize(("kwargs", "type"), [({"tokenize": True}, "unknown_parameter"), ([], "wrong_type")])
def test_variables_of_a_chat_template_cannot_reach_the_call(kwargs: object, type: str) -> None:
    with pytest.raises(Refused) as caught:
        template_kwargs(kwargs, "chat_template_kwargs")
    assert caught.value.type == type


def test_null_variables_are_left_out() -> None:
    assert template_kwargs({"a": None, "b": False}, "x") == {"b": False}
    assert template_kwargs(None, "x") == {}


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ missing }}", "'missing' is undefined"),
        ("{{ a.__class__ }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ a + 1 }}", "can only concatenate"),
        ("{{ 1 // n }}", "zero"),
        ("{{ nothing }}", "null"),
        ("{{ none }}", "null"),
        ("{% include 'x' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(10 ** 9) }}", "too big"),
    ],
)
def test_template_that_fails_is_refused(template: str, complaint: str) -> None:
    render = compile_template(template)
    with pytest.raises(Refused, match=r"^the template failed: ") as caught:
        render({"a": "x", "n": 0, "nothing": None})
    assert caught.value.type == "template"
    assert complaint in caught.value.message


def test_template_may_ask_whether_a_column_is_there() -> None:
    render = compile_template("{% if nothing %}{{ nothing }}{% endif %}{{ missing is defined }}")
    assert render({"nothing": None}) == "False"


@pytest.mark.parametrize("template", ["x\n{% if %}", "x\n{{ a | nofilter }}"])
def test_text_that_is_no_template_is_refused_at_once(template: str) -> None:
    with pytest.raises(ValueError, match="--template is no Jinja template: line 2: "):
        compile_template(template)
