"""The tools that a row offers: `tools`, `tool_choice` and `parallel_tool_calls`, of bodies and plain rows alike. Pure.

What a row must call is a matter of a constraint: `Offer.constraint` makes the schema for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchgen.requests.constraints import read_schema
from batchgen.requests.refusal import Refused, quote
from batchgen.requests.template import without_null_keys
from batchgen.requests.tools import NAMED, REQUIRED, Functions
from batchgen.types import Constraint

KEYS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
"""What is read here."""

_CHOICES = ("auto", "none", "required")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_PARAMETERS: Mapping[str, object] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Offer:
    """The tools of one row."""

    definitions: Sequence[Mapping[str, object]]  # as chat templates take them
    functions: Functions
    choice: str  # auto or required, or the name of the only function that may be called, behind `NAMED`
    is_parallel: bool  # several calls may be made at once

    @property
    def is_forced(self) -> bool:
        """Whether the row must call a tool."""
        return self.choice != "auto"

    @property
    def form(self) -> str:
        """The form of its calls, where it must call a tool."""
        return REQUIRED if self.choice == "required" else self.choice

    def constraint(self, prefix: str) -> Constraint:
        """What the text must be, where the row must call a tool: the arguments of the named function, or a list of one
        or more calls.

        Raises:
            Refused: a schema cannot be enforced.
        """
        if self.choice.startswith(NAMED):
            schema: Mapping[str, object] = self.functions[self.choice.removeprefix(NAMED)]
        else:
            schema = _schema_of_calls(self.functions, self.is_parallel)
        return read_schema(schema, f"{prefix}tools", {})


def read_offer(given: Mapping[str, object], prefix: str) -> Offer | None:
    """The tools that a body or a plain row offers; None: there are none, or it may call none of them.

    An empty list of tools is none. With `tool_choice` "none" the model is not told of the tools.

    Args:
        prefix: what stands before the keys in sentences: "body." or nothing.

    Raises:
        Refused: a key is of the wrong type, or contradicts another.
    """
    listed, choice, parallel = (given.get(key) for key in ("tools", "tool_choice", "parallel_tool_calls"))
    if parallel is not None and not isinstance(parallel, bool):
        raise Refused("wrong_type", f"{prefix}parallel_tool_calls must be true or false, not {quote(parallel)}")
    definitions = _definitions(listed, f"{prefix}tools")
    functions = {str(name): schema for name, schema in map(_function, definitions)}
    chosen = _choice(choice, functions, prefix)
    if not functions or chosen == "none":
        return None
    return Offer(definitions, functions, chosen, parallel is not False)


def _definitions(listed: object, name: str) -> list[Mapping[str, object]]:
    if isinstance(listed, str) and not name.startswith("body."):
        # In tables, whose columns have one type for all rows, tools are mostly written as JSON.
        try:
            listed = json.loads(listed)
        except (ValueError, RecursionError):
            raise Refused(
                "wrong_type", f"{name} must be a list of tools, or JSON of one, not {quote(listed)}"
            ) from None
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise Refused("wrong_type", f"{name} must be a list of tools, not {quote(listed)}")
    definitions = [_definition(tool, f"{name}[{number}]") for number, tool in enumerate(listed)]
    names = [_function(definition)[0] for definition in definitions]
    for number, each in enumerate(names):
        if each in names[:number]:
            raise Refused("wrong_type", f"{name}[{number}]: there is another function named {quote(each)}")
    return definitions


def _definition(tool: object, name: str) -> Mapping[str, object]:
    if not isinstance(tool, Mapping):
        raise Refused("wrong_type", f"{name} must be an object with type and function, not {quote(tool)}")
    if tool.get("type") != "function":
        raise Refused("unknown_parameter", f'{name}: type must be "function", not {quote(tool.get("type"))}')
    function = without_null_keys(tool.get("function"))
    if not isinstance(function, Mapping):
        raise Refused(
            "wrong_type", f"{name}: function must be an object with a name, not {quote(tool.get('function'))}"
        )
    called = function.get("name")
    if not isinstance(called, str) or not _NAME.fullmatch(called):
        raise Refused(
            "wrong_type",
            f"{name}: function.name must be 1 to 64 letters, digits, dots, dashes and underscores, not {quote(called)}",
        )
    if not isinstance(function.get("description", ""), str):
        raise Refused(
            "wrong_type", f"{name}: function.description must be a text, not {quote(function['description'])}"
        )
    parameters = function.get("parameters", {})
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise Refused("wrong_type", f"{name}: function.parameters must be a JSON schema of an object")
    return {**tool, "function": function}


def _function(definition: Mapping[str, object]) -> tuple[object, Mapping[str, object]]:
    function = definition["function"]
    assert isinstance(function, Mapping)  # `_definition` has checked it
    return function["name"], function.get("parameters") or _NO_PARAMETERS


def _choice(choice: object, functions: Functions, prefix: str) -> str:
    if choice is None:
        return "auto"
    if choice == "none":
        return "none"
    named = None
    if isinstance(choice, Mapping):
        function = choice.get("function")
        named = function.get("name") if isinstance(function, Mapping) else None
        if choice.get("type") != "function" or not isinstance(named, str):
            raise Refused(
                "wrong_type",
                f'{prefix}tool_choice must name a function as {{"type": "function", "function": {{"name": …}}}}',
            )
    elif choice not in _CHOICES:
        raise Refused(
            "wrong_type",
            f'{prefix}tool_choice must be "auto", "none", "required" or an object that names a function, '
            f"not {quote(choice)}",
        )
    if not functions and choice != "auto":
        raise Refused("wrong_type", f"{prefix}tool_choice needs {prefix}tools, and there are none")
    if named is not None and named not in functions:
        offered = ", ".join(list(functions)[:20])
        raise Refused("wrong_type", f"{prefix}tool_choice names {quote(named)}, but the tools are {offered}")
    return str(choice) if named is None else NAMED + named


def _schema_of_calls(functions: Functions, is_parallel: bool) -> Mapping[str, object]:
    """The schema of a list of calls. That of each function stands by itself, so that what it refers to is found."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{_pointed(name)}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name in functions
    ]
    return {
        "type": "array",
        "minItems": 1,
        **({} if is_parallel else {"maxItems": 1}),
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
        "$defs": {name: _moved(schema, f"#/$defs/{_pointed(name)}") for name, schema in functions.items()},
    }


def _pointed(name: str) -> str:
    """A name within a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


_DATA = frozenset({"const", "enum", "default", "examples"})  # of a schema: no schemas themselves
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def _moved(schema: object, place: str) -> object:
    """The schema as it must be written at `place`: what it refers to within itself has moved there."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, object] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = place + value[1:]
        elif key in _NAMED_SCHEMAS and isinstance(value, Mapping):  # whose keys may be any words
            moved[key] = {name: _moved(each, place) for name, each in value.items()}
        else:
            moved[key] = value if key in _DATA else _moved(value, place)
    return moved
