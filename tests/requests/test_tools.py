"""Tools that rows offer: what is read of bodies and plain rows, what is refused, and what a forced call is bound to."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from batchgen.requests.conversations import KEYS, read_conversation
from batchgen.requests.refusal import Refused
from batchgen.requests.tools import NAMED
from batchgen.requests.tools.offers import read_offer


def tool(name: str = "weather", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def named(name: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def test_tools_are_read_with_their_choice() -> None:
    offer = read_offer({"tools": [tool(parameters=CITY, strict=None), tool("time")]}, "body.")
    assert offer is not None
    assert (offer.choice, offer.is_forced, offer.is_parallel) == ("auto", False, True)
    assert list(offer.definitions) == [tool(parameters=CITY), tool("time")]
    assert offer.functions["weather"] == CITY
    forced = read_offer({"tools": [tool()], "tool_choice": named("weather"), "parallel_tool_calls": False}, "body.")
    assert forced is not None
    assert (forced.choice, forced.form, forced.is_parallel) == (NAMED + "weather", NAMED + "weather", False)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"tools": None, "tool_choice": None},
        {"tools": []},
        {"tools": [], "tool_choice": "auto"},
        {"tool_choice": "none"},
        {"tools": [tool()], "tool_choice": "none"},
    ],
)
def test_without_tools_or_choice_nothing_may_be_called(given: dict[str, Any]) -> None:
    assert read_offer(given, "body.") is None


def test_a_column_may_hold_tools_as_json() -> None:
    given = {"tools": json.dumps([tool(parameters=CITY)])}
    offer = read_offer(given, "")
    assert offer is not None
    assert list(offer.definitions) == [tool(parameters=CITY)]
    with pytest.raises(Refused, match=r"^body\.tools must be a list of tools, not "):
        read_offer(given, "body.")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tools": {}}, "body.tools must be a list of tools, not an empty object"),
        ({"tools": ["weather"]}, 'body.tools[0] must be an object with type and function, not "weather"'),
        ({"tools": [{"type": "custom"}]}, 'body.tools[0]: type must be "function", not "custom"'),
        ({"tools": [{"type": "function"}]}, "body.tools[0]: function must be an object with a name, not null"),
        ({"tools": [tool(""), tool()]}, "body.tools[0]: function.name must be 1 to 64 letters, digits, dots, dashes"),
        ({"tools": [tool("a b")]}, 'underscores, not "a b"'),
        ({"tools": [tool(description=5)]}, "body.tools[0]: function.description must be a text, not 5"),
        (
            {"tools": [tool(), tool(parameters=[])]},
            "body.tools[1]: function.parameters must be a JSON schema of an obj",
        ),
        ({"tools": [tool(parameters={"type": "string"})]}, "function.parameters must be a JSON schema of an object"),
        ({"tools": [tool(), tool()]}, 'body.tools[1]: there is another function named "weather"'),
        ({"tools": [tool()], "tool_choice": "always"}, 'body.tool_choice must be "auto", "none", "required" or an obj'),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "body.tool_choice must name a function as {"),
        ({"tools": [tool()], "tool_choice": named("time")}, 'body.tool_choice names "time", but the tools are weather'),
        ({"tool_choice": "required"}, "body.tool_choice needs body.tools, and there are none"),
        ({"tools": [], "tool_choice": named("time")}, "body.tool_choice needs body.tools, and there are none"),
        ({"tools": [tool()], "parallel_tool_calls": 1}, "body.parallel_tool_calls must be true or false, not 1"),
        ({"documents": "x"}, "body.documents must be a list of objects with title and text"),
        ({"reasoning_effort": "huge"}, "body.reasoning_effort must be one of none, minimal, low, medium, high, xhigh"),
        ({"enable_thinking": "no"}, 'body.enable_thinking must be true or false, not "no"'),
        ({"include_reasoning": 0}, "body.include_reasoning must be true or false, not 0"),
        ({"chat_template": 5}, "body.chat_template must be a text, not 5"),
        ({"add_generation_prompt": "no"}, 'body.add_generation_prompt must be true or false, not "no"'),
        ({"continue_final_message": True, "add_generation_prompt": True}, "are both true, but a text either goes on"),
        ({"continue_final_message": True}, 'needs a last message of the role assistant, not "user"'),
    ],
)
def test_what_is_of_another_form_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused) as caught:
        read_conversation(given, [{"role": "user", "content": "Hi"}], "body.")
    assert sentence in caught.value.message
    assert given.keys() <= KEYS
    bare = {key: value for key, value in given.items() if not isinstance(value, str)}
    if bare == given:  # a column says it in the same words, without the body
        with pytest.raises(Refused) as caught:
            read_conversation(given, [{"role": "user", "content": "Hi"}], "")
        assert sentence.replace("body.", "") in caught.value.message


@pytest.mark.parametrize(
    ("given", "variables"),
    [
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high", "enable_thinking": True}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
         {"reasoning_effort": "low", "enable_thinking": False}),
        ({"enable_thinking": False}, {"enable_thinking": False}),
        ({"documents": [{"title": "a", "text": "b"}]}, {"documents": [{"title": "a", "text": "b"}]}),
        ({"documents": [], "chat_template_kwargs": {"x": 1}}, {"x": 1}),
    ],
)  # fmt: skip
def test_what_the_template_is_told(given: dict[str, Any], variables: dict[str, Any]) -> None:
    assert read_conversation(given, [{"role": "user", "content": "Hi"}], "body.").variables == variables


# Two functions whose schemas have definitions of the same name, and one that points to itself.
REFERRING = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/size"}, "default": {"$ref": "#/$defs/size"}},
    "required": ["x"],
    "$defs": {"size": {"type": "integer"}},
}
TREE = {
    "type": "object",
    "properties": {"size": {"$ref": "#/$defs/size"}, "inner": {"$ref": "#"}, "$ref": {"const": "#"}},
    "additionalProperties": False,
    "$defs": {"size": {"enum": ["S", "M"]}},
}


@pytest.mark.parametrize(
    ("value", "is_valid"),
    [
        ([{"name": "first", "parameters": {"x": 3}}], True),
        ([{"name": "first", "parameters": {"x": 3}}, {"name": "tree", "parameters": {"inner": {"size": "M"}}}], True),
        ([{"name": "tree", "parameters": {"$ref": "#"}}], True),
        ([{"name": "bare", "parameters": {}}], True),
        ([], False),
        ([{"name": "first", "parameters": {"x": "S"}}], False),
        ([{"name": "first", "parameters": {"x": 3, "default": "S"}}], False),
        ([{"name": "tree", "parameters": {"size": 3}}], False),
        ([{"name": "tree", "parameters": {"inner": {"size": 3}}}], False),
        ([{"name": "bare", "parameters": {"x": 3}}], False),
        ([{"name": "other", "parameters": {}}], False),
        ([{"name": "bare"}], False),
    ],
)
def test_required_calls_are_bound_to_the_schemas_of_all_tools(value: object, is_valid: bool) -> None:
    tools = [tool("first", parameters=REFERRING), tool("tree", parameters=TREE), tool("bare")]
    for parallel in (True, False):
        offer = read_offer({"tools": tools, "tool_choice": "required", "parallel_tool_calls": parallel}, "body.")
        assert offer is not None
        constraint = offer.constraint("body.")  # llguidance can enforce it, or it is refused
        may_be = is_valid and (parallel or len(value) == 1)  # type: ignore[arg-type]
        validator = jsonschema.Draft202012Validator(json.loads(constraint.text))
        assert validator.is_valid(value) is may_be


def test_a_named_call_is_bound_to_the_schema_of_its_function() -> None:
    offer = read_offer({"tools": [tool(parameters=CITY), tool("time")], "tool_choice": named("weather")}, "body.")
    assert offer is not None
    assert json.loads(offer.constraint("body.").text) == CITY


def test_a_schema_that_cannot_be_enforced_is_refused_where_it_must_be() -> None:
    unique = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    given: dict[str, Any] = {"tools": [tool(parameters=unique)]}
    assert read_offer(given, "body.") is not None
    offer = read_offer({**given, "tool_choice": "required"}, "body.")
    assert offer is not None
    with pytest.raises(Refused, match=r"^body\.tools: the schema uses uniqueItems, which cannot be enforced") as caught:
        offer.constraint("body.")
    assert caught.value.type == "constraint"
