"""What a text must be: read from plain rows and bodies, checked, and made a grammar that llguidance follows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import llguidance
import pytest

from batchgen.requests.constraints import ANY_OBJECT, check, make_grammar, read_constraint
from batchgen.requests.openai import parse
from batchgen.requests.openai_completions import CHAT, COMPLETIONS
from batchgen.requests.openai_responses import RESPONSES
from batchgen.requests.prompts import PromptReader
from batchgen.requests.recipe import Recipe
from batchgen.requests.refusal import Refused
from batchgen.types import Constraint, ConstraintKind, Prompt, SamplingParams
from tests.byte_tokenizer import ByteTokenizer, request, rows
from tests.requests.test_prompts import error, prompt

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}
SCHEMA = Constraint("json_schema", json.dumps(PERSON))


class _Bytes:
    """A vocabulary of the 256 bytes and an end, as llguidance asks for it."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


TOKENS = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))


def follows(constraint: Constraint, text: str) -> bool:
    """Whether the grammar of the constraint takes the whole text, and lets it end there."""
    matcher = llguidance.LLMatcher(TOKENS, make_grammar(constraint))
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad"),
    [
        ("json_schema", PERSON,
         ['{"name":"é","age":5}', '{\n  "name": "a"\n}'], ['{"age":5}', '{"age":5,"name":"a"}', "{}"]),
        ("json_schema", json.dumps(PERSON), ['{"name": "a"}'], ['{"name": 5}']),
        ("json_schema", True, ["5", '[{"a": null}]'], ["a"]),
        ("json_schema", {"type": "integer"}, ["5"], [" 5", "5.5"]),
        ("json_schema", {"type": "array"}, ["[" + " " * 25 + "]"], ["[" + " " * 26 + "]"]),
        ("json_schema", {"type": "array", "x-guidance": {"whitespace_flexible": False}}, ["[5,6]"], ["[5, 6]"]),
        ("json_schema", {"type": "string", "pattern": "b"}, ['"abc"'], ['"ac"']),
        ("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"enum": ["x", 5, None]}}}, ['"x"', "5", "null"], ['"y"']),
        ("regex", r"\d{3}-[a-ü]+", ["123-aü"], ["12-a", "123-", "x123-a"]),
        ("regex", r"^a|b$", ["a", "b"], ["ab", ""]),
        ("choice", ["yes", "no", 'oder "so"\n'], ["yes", 'oder "so"\n'], ["ye", "yesno"]),
        ("grammar", 'start: "a"+ b\nb: "b"', ["aab"], ["b", "aa"]),
        ("grammar", 'root ::= "a" digit\ndigit ::= [0-9]', ["a5"], ["a", "5"]),
    ],
)  # fmt: skip
def test_a_constraint_is_read_and_followed(
    kind: ConstraintKind, value: object, good: list[str], bad: list[str]
) -> None:
    constraint = read_constraint(kind, value, "it")
    check(constraint)
    assert [text for text in good if not follows(constraint, text)] == []
    assert [text for text in bad if follows(constraint, text)] == []


@pytest.mark.parametrize(
    ("kind", "value", "type", "complaint"),
    [
        ("json_schema", 5, "wrong_type", "it must be a JSON schema, an object or its JSON text, not 5"),
        ("json_schema", False, "wrong_type", "it must be a JSON schema, an object or its JSON text, not false"),
        ("json_schema", "[]", "wrong_type", "it must be a JSON schema"),
        ("json_schema", "{", "wrong_type", "it is no JSON: Expecting"),
        ("json_schema", {"a": b"bytes"}, "wrong_type", "it is no JSON schema: Object of type bytes is not JSON"),
        ("json_schema", {"uniqueItems": True}, "constraint",
         "the schema uses uniqueItems, which cannot be enforced; leave it out"),
        ("json_schema", {"items": {"if": {}, "then": {}, "not": {}}}, "constraint", "schema uses if, not and then,"),
        ("json_schema", {"type": "foo"}, "constraint", "it: the schema cannot be enforced: Invalid type: foo"),
        ("json_schema", {"format": "colour"}, "constraint", "Unknown format: colour"),
        ("json_schema", {"$ref": "http://example.org/a"}, "constraint", "the schema cannot be enforced: Resource"),
        ("json_schema", {"minimum": 5, "maximum": 3, "type": "integer"}, "constraint", "Unsatisfiable schema: minimum"),
        ("json_schema", {"not": {}, "x-guidance": {"lenient": True}}, "constraint", "the schema uses not"),
        ("json_schema", {"x-guidance": 5}, "constraint", "x-guidance must be an object"),
        ("regex", "", "wrong_type", 'it must be a text that is not empty, not ""'),
        ("regex", "(", "constraint", "it: the regular expression cannot be enforced: unclosed group"),
        ("regex", r"(a)\1", "constraint", "backreferences are not supported"),
        ("choice", [], "wrong_type", "it must be a list of texts, none of them empty, not an empty list"),
        ("choice", ["a", 5], "wrong_type", "it must be a list of texts"),
        ("grammar", None, "wrong_type", "it must be a text that is not empty, not null"),
        ("grammar", 'start: b\nb: c', "constraint", 'enforced: line 2, column 4: unknown name: "c"'),
        ("grammar", "root ::= x", "constraint", "Rule 'x' not found"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused_by_name(
    kind: ConstraintKind, value: object, type: str, complaint: str
) -> None:
    with pytest.raises(Refused) as caught:
        read_constraint(kind, value, "it")
    assert caught.value.type == type
    assert complaint in caught.value.message
    assert "\n" not in caught.value.message


FORMAT = {"type": "json_schema", "name": "person", "strict": True, "schema": PERSON}
OPENAI_FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "strict": None, "schema": PERSON}}
OPEN, CLOSED = {"properties": {"properties": {"properties": {}}}}, {"additionalProperties": False}

# A body, where it goes, and its constraint.
BODIES: list[tuple[dict[str, object], str, Constraint | None]] = [
    ({"response_format": {"type": "text"}}, CHAT, None),
    ({"response_format": {"type": "json_object"}}, CHAT, ANY_OBJECT),
    ({"response_format": OPENAI_FORMAT}, CHAT, SCHEMA),
    ({"response_format": OPENAI_FORMAT}, COMPLETIONS, SCHEMA),
    ({"text": {"format": FORMAT}}, RESPONSES, SCHEMA),
    ({"text": {"format": {"type": "json_object"}}}, RESPONSES, ANY_OBJECT),
    ({"text": {}}, RESPONSES, None),
    ({"structured_outputs": {"json": PERSON, "regex": None}}, CHAT, SCHEMA),
    ({"structured_outputs": {"json": json.dumps(PERSON)}}, COMPLETIONS, SCHEMA),
    ({"structured_outputs": {"regex": "a+"}}, CHAT, Constraint("regex", "a+")),
    ({"structured_outputs": {"choice": ["é", "b", "é"]}}, CHAT, Constraint("choice", '["é", "b"]')),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, CHAT, Constraint("grammar", 'root ::= "a"')),
    ({"structured_outputs": {"json_object": True, "json": None}}, CHAT, ANY_OBJECT),
    (
        {"structured_outputs": {"json": {}, "whitespace_pattern": " ?"}},
        CHAT,
        Constraint("json_schema", '{"x-guidance": {"whitespace_pattern": " ?"}}'),
    ),
    (
        {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
        CHAT,
        Constraint("json_schema", '{"x-guidance": {"whitespace_flexible": false}}'),
    ),
    (
        {"structured_outputs": {"json": {**OPEN, "default": OPEN}, "disable_additional_properties": True}},
        CHAT,
        Constraint(
            "json_schema",
            json.dumps({"properties": {"properties": {"properties": {}, **CLOSED}}, "default": OPEN, **CLOSED}),
        ),
    ),
    ({"guided_json": PERSON, "guided_decoding_backend": "outlines"}, CHAT, SCHEMA),
    ({"guided_regex": "a+"}, COMPLETIONS, Constraint("regex", "a+")),
    ({"guided_choice": ["a"]}, CHAT, Constraint("choice", '["a"]')),
    ({"guided_grammar": 'start: "a"'}, CHAT, Constraint("grammar", 'start: "a"')),
    ({"json_schema": json.dumps(PERSON)}, CHAT, SCHEMA),
    ({"regex": "a+"}, CHAT, Constraint("regex", "a+")),
    ({"ebnf": 'root ::= "a"'}, CHAT, Constraint("grammar", 'root ::= "a"')),
    ({"response_format": {"type": "text"}, "regex": "a+"}, CHAT, Constraint("regex", "a+")),
]
MESSAGES = [{"role": "user", "content": "Hello"}]
INPUTS: dict[str, dict[str, object]] = {
    CHAT: {"messages": MESSAGES},
    COMPLETIONS: {"prompt": "x"},
    RESPONSES: {"input": "x"},
}


def line(body: Mapping[str, object], url: str = CHAT) -> dict[str, object]:
    return request({**INPUTS[url], **body}, url=url)


@pytest.mark.parametrize(("body", "url", "expected"), BODIES)
def test_a_body_says_what_its_text_must_be(body: dict[str, object], url: str, expected: Constraint | None) -> None:
    parsed = parse(line(body, url))
    assert parsed.ignored == []
    assert parsed.sampling["constraint"] == expected


@pytest.mark.parametrize(
    ("body", "type", "complaint"),
    [
        ({"response_format": "json"}, "wrong_type", 'body.response_format must be an object with a type, not "json"'),
        ({"response_format": {"type": "json_schema"}}, "wrong_type", "json_schema must be an object with name and"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "wrong_type", "the name of the"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "wrong_type",
            'the name of the schema must be 1 to 64 letters from a to z, digits, _ and -, not "a b"',
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "wrong_type", "schema must be an"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": 1}}},
            "wrong_type",
            "strict must be true or false, not 1",
        ),
        ({"response_format": {"type": "structural_tag"}}, "unknown_parameter", "structural_tag is not supported"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "unknown_parameter", "structural_tag is not supported"),
        ({"structured_outputs": {"jsn": {}}}, "unknown_parameter", 'has the key "jsn", which is not supported'),
        ({"structured_outputs": {}}, "wrong_type", "must have exactly one of json, regex, choice, grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "wrong_type", "not 2 of them"),
        ({"structured_outputs": {"regex": 5}}, "wrong_type", "body.structured_outputs.regex must be a text"),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": 5}}, "wrong_type", "must be a regular expression"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "wrong_type", "body.guided_regex and body.guided_choice both"),
        ({"guided_json": {"uniqueItems": True}}, "constraint", "body.guided_json: the schema uses uniqueItems, which"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
         "constraint", "body.response_format: the schema uses not, which cannot be enforced; leave it out"),
    ],
)  # fmt: skip
def test_a_body_that_says_it_wrongly_is_refused(body: dict[str, object], type: str, complaint: str) -> None:
    with pytest.raises(Refused) as caught:
        parse(line(body))
    assert caught.value.type == type
    assert complaint in caught.value.message


def test_the_order_of_the_keys_is_that_of_the_schema() -> None:
    for names in (("b", "a"), ("a", "b")):
        schema = {"type": "object", "properties": {name: {"const": 1} for name in names}, "required": ["a", "b"]}
        constraint = read_constraint("json_schema", schema, "it")
        assert follows(constraint, json.dumps(dict.fromkeys(names, 1)))
        assert not follows(constraint, json.dumps(dict.fromkeys(reversed(names), 1)))


def test_a_row_s_own_constraint_wins_over_that_of_the_run() -> None:
    recipe = Recipe(sampling=SamplingParams(constraint=SCHEMA))
    own = Constraint("choice", '["a"]')
    assert prompt({"prompt": "x"}, recipe).params.constraint == SCHEMA
    assert prompt({"prompt": "x", "choice": ["a"], "json_schema": None}, recipe).params.constraint == own
    assert prompt(line({"guided_choice": ["a"]}), recipe).params.constraint == own
    assert prompt(line({}), recipe).params.constraint == SCHEMA
    assert prompt(line({"response_format": {"type": "text"}}), recipe).params.constraint is None
    with pytest.raises(
        ValueError, match=r"^--json-schema: the schema uses not, which cannot be enforced; leave it out$"
    ):
        Recipe(sampling=SamplingParams(constraint=Constraint("json_schema", '{"not": {}}')))


def test_a_column_that_the_template_uses_is_none_of_the_row_s_settings() -> None:
    row: dict[str, Any] = {"choice": "B", "n": 7, "regex": 5}
    assert error(row, Recipe(template="{{ n }}")).message.endswith(
        "regex and choice both say what the text must be; give one of them"
    )
    used = prompt(row, Recipe(template="{{ choice }} {{ n }} {{ regex }}"))
    assert (used.text, used.params) == ("B 7 5", SamplingParams())


def test_a_schema_is_checked_once_for_all_rows_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    matcher = llguidance.LLMatcher

    class Counting:
        grammar_from_json_schema = staticmethod(matcher.grammar_from_json_schema)

        @staticmethod
        def validate_grammar(grammar: str) -> str:
            checked.append(grammar)
            return matcher.validate_grammar(grammar)

    monkeypatch.setattr(llguidance, "LLMatcher", Counting)
    schema = {"type": "object", "title": "checked once for all rows"}
    results = PromptReader(Recipe(), ByteTokenizer(), {}).read(rows(*[{"prompt": "x", "json_schema": schema}] * 3))
    assert all(isinstance(result, Prompt) for result in results)
    assert len(checked) == 1
