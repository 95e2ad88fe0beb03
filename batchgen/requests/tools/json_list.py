"""A JSON list of `{"name": …, "parameters": {…}}`: what a row that must call a tool is constrained to, by any model."""

from __future__ import annotations

from batchgen.requests.tools._form import Call, Functions, ParsedCalls
from batchgen.requests.tools._json import NoJson, arguments_of, name_of, read_objects, skip_space

MARKS: tuple[str, ...] = ()


def is_in(template: str) -> bool:
    """No chat template writes calls so."""
    return False


def find_calls(text: str, functions: Functions) -> ParsedCalls | None:
    """The calls that `text` is; None: it is something else, or was cut off."""
    try:
        objects, end = read_objects(text, skip_space(text, 0))
        if skip_space(text, end) != len(text):
            return None
        return (
            ParsedCalls("", [Call(name_of(each), arguments_of(each, "parameters")) for each in objects])
            if objects
            else None
        )
    except NoJson:
        return None
