"""What a request's body says of the form of its text: OpenAI's, vLLM's and SGLang's ways. Pure.

They are `response_format` (OpenAI), `text.format` of a Response, `structured_outputs` and the older `guided_json` and
its like (vLLM), and `json_schema`, `regex` and `ebnf` in the body itself (SGLang). A schema is always enforced,
whatever `strict` says, as with vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from batchgen.requests.constraints import ANY_OBJECT, read_constraint, read_schema
from batchgen.requests.refusal import Refused, quote
from batchgen.requests.template import without_null_keys
from batchgen.types import Constraint, ConstraintKind

Options = Mapping[str, object]  # of llguidance, beside those of a schema

_OF_THE_BODY: Mapping[str, ConstraintKind] = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json_schema",
    "regex": "regex",
    "ebnf": "grammar",
}
KEYS = frozenset({*_OF_THE_BODY, "response_format", "structured_outputs", "guided_whitespace_pattern"})
"""The keys of a body that are read here; and `text` of a Response."""

_STRUCTURED: Mapping[str, ConstraintKind] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}
_STRUCTURED_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
_NO_STRUCTURAL_TAG = "structural_tag is not supported; structured_outputs takes json, regex, choice and grammar"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # OpenAI's rule for the name of a schema


def read_body_constraint(body: Mapping[str, object], *, is_response: bool) -> dict[str, Constraint | None]:
    """The constraint of a body as `{"constraint": …}`: None if the body says that there is none; {} if it says nothing.

    Args:
        is_response: the body is one of /v1/responses.

    Raises:
        Refused: what it says is malformed, is said twice, or cannot be enforced.
    """
    values: dict[str, Constraint | None] = {}
    options = _whitespace(body.get("guided_whitespace_pattern"), "body.guided_whitespace_pattern")
    readers: list[tuple[str, Callable[[object, str], Constraint | None]]] = [
        ("response_format", _read_response_format),
        ("structured_outputs", _read_structured_outputs),
    ]
    for key, read in readers:
        if body.get(key) is not None:
            values[key] = read(body[key], f"body.{key}")
    for key, kind in _OF_THE_BODY.items():
        value = body.get(key)
        if value is not None:
            name = f"body.{key}"
            is_schema = kind == "json_schema"
            values[key] = read_schema(value, name, options) if is_schema else read_constraint(kind, value, name)
    if is_response and body.get("text") is not None:
        values["text"] = _read_text(body["text"])
    given = [key for key, constraint in values.items() if constraint is not None]
    if len(given) > 1:
        raise Refused(
            "wrong_type", f"body.{given[0]} and body.{given[1]} both say what the text must be; give one of them"
        )
    if not values:
        return {}
    return {"constraint": values[given[0]] if given else None}


def _read_response_format(value: object, name: str) -> Constraint | None:
    """OpenAI's `response_format`: its schema is in a key of its own."""
    if not isinstance(value, Mapping):
        raise Refused("wrong_type", f"{name} must be an object with a type, not {quote(value)}")
    if value.get("type") != "json_schema":
        return _read_format(value, name)
    described = value.get("json_schema")
    if not isinstance(described, Mapping):
        raise Refused(
            "wrong_type", f"{name}: json_schema must be an object with name and schema, not {quote(described)}"
        )
    return _read_format({**described, "type": "json_schema"}, name)


def _read_text(value: object) -> Constraint | None:
    """`text` of a Response."""
    if not isinstance(value, Mapping):
        raise Refused("wrong_type", f"body.text must be an object, not {quote(value)}")
    if other := [key for key, each in value.items() if key != "format" and each is not None]:
        raise Refused("unknown_parameter", f"body.text is not supported with {quote(other[0])}: leave that out")
    form = value.get("format")
    if form is None:
        return None
    if not isinstance(form, Mapping):
        raise Refused("wrong_type", f"body.text: format must be an object with a type, not {quote(form)}")
    return _read_format(form, "body.text")


def _read_format(form: Mapping[str, object], name: str) -> Constraint | None:
    """A format with `type`, and beside it what belongs to the type."""
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind == "structural_tag":
        raise Refused("unknown_parameter", f"{name}: {_NO_STRUCTURAL_TAG}")
    if kind != "json_schema":
        types = '"text", "json_object" or "json_schema"'
        raise Refused("unknown_parameter", f"{name} is not supported: its type must be {types}, not {quote(kind)}")
    schema, title, strict = form.get("schema"), form.get("name"), form.get("strict")
    if not isinstance(title, str) or not _NAME.fullmatch(title):
        rule = "1 to 64 letters from a to z, digits, _ and -"
        raise Refused("wrong_type", f"{name}: the name of the schema must be {rule}, not {quote(title)}")
    if not isinstance(strict, bool | None):
        raise Refused("wrong_type", f"{name}: strict must be true or false, not {quote(strict)}")
    if not isinstance(schema, Mapping | str):  # a table can hold it as JSON text alone
        raise Refused("wrong_type", f"{name}: schema must be an object, not {quote(schema)}")
    return read_schema(schema, name, {})


def _read_structured_outputs(value: object, name: str) -> Constraint | None:
    """vLLM's `structured_outputs`: exactly one constraint, and options of JSON."""
    given = without_null_keys(value)
    if not isinstance(given, Mapping):
        raise Refused("wrong_type", f"{name} must be an object, not {quote(value)}")
    if "structural_tag" in given:
        raise Refused("unknown_parameter", f"{name}: {_NO_STRUCTURAL_TAG}")
    for key in given:
        if key not in _STRUCTURED and key not in _STRUCTURED_OPTIONS and key != "json_object":
            raise Refused("unknown_parameter", f"{name} has the key {quote(key)}, which is not supported; leave it out")
    named = [key for key in (*_STRUCTURED, "json_object") if key in given and given[key] is not False]
    if len(named) != 1:
        listed = ", ".join((*_STRUCTURED, "json_object"))
        raise Refused("wrong_type", f"{name} must have exactly one of {listed}, not {len(named)} of them")
    [key] = named
    if key == "json_object":
        if given[key] is not True:
            raise Refused("wrong_type", f"{name}: json_object must be true or false, not {quote(given[key])}")
        return read_schema(ANY_OBJECT.text, name, _options(given, name))
    kind = _STRUCTURED[key]
    if kind != "json_schema":
        return read_constraint(kind, given[key], f"{name}.{key}")
    schema = read_schema(given[key], f"{name}.json", _options(given, name))
    return schema if not given.get("disable_additional_properties") else _closed(schema, f"{name}.json")


def _options(given: Mapping[str, object], name: str) -> Options:
    for key in _STRUCTURED_OPTIONS[:2]:
        if not isinstance(given.get(key), bool | None):
            raise Refused("wrong_type", f"{name}: {key} must be true or false, not {quote(given[key])}")
    options = dict(_whitespace(given.get("whitespace_pattern"), f"{name}.whitespace_pattern"))
    if given.get("disable_any_whitespace"):
        options["whitespace_flexible"] = False
    return options


def _whitespace(pattern: object, name: str) -> Options:
    if pattern is None:
        return {}
    if not isinstance(pattern, str):
        raise Refused("wrong_type", f"{name} must be a regular expression, not {quote(pattern)}")
    return {"whitespace_pattern": pattern}


# What a schema holds in these keys are schemas by other names, and in those values.
_MAPS_OF_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_VALUES = frozenset({"const", "enum", "default", "examples"})


def _closed(constraint: Constraint, name: str) -> Constraint:
    """The schema with no properties in its objects but those that it names, as vLLM understands it."""
    return read_schema(_close(json.loads(constraint.text)), name, {})


def _close(schema: object) -> object:
    if isinstance(schema, list):
        return [_close(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed: dict[str, object] = {}
    for key, value in schema.items():
        if key in _MAPS_OF_SCHEMAS and isinstance(value, Mapping):
            closed[key] = {name: _close(each) for name, each in value.items()}
        else:
            closed[key] = value if key in _VALUES else _close(value)
    if "properties" in closed or "patternProperties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed
