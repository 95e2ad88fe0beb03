"""JSON that a model has written: read strictly, and each value also as it was written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn, TypeVar

Item = TypeVar("Item")

_SPACE = re.compile(r"[ \t\n\r]*")


class Member(NamedTuple):
    """A value of a JSON object."""

    value: object
    written: str  # the same, as it stands in the text


class NoJson(ValueError):
    """The text is not what was looked for: cut off, or wrong."""


def skip_space(text: str, at: int) -> int:
    """The place of the first character from `at` on that is no white space of JSON."""
    match = _SPACE.match(text, at)
    return at if match is None else match.end()


def read_value(text: str, at: int) -> tuple[object, int]:
    """The JSON value that begins at `at`, and the place behind it.

    Raises:
        NoJson: there is none, it is not complete, or it is too deep to be read.
    """
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        raise NoJson(str(error)) from None


def read_object(text: str, at: int) -> tuple[dict[str, Member], int]:
    """The JSON object that begins at `at`, each member with its text, and the place behind it.

    Raises:
        NoJson: there is none, or it is not complete.
    """
    members, end = _read_items(text, at, ("{", "}", "object"), _read_member)
    return dict(members), end


def _read_member(text: str, at: int) -> tuple[tuple[str, Member], int]:
    """A name and its value."""
    name, end = read_value(text, at)
    at = skip_space(text, end)
    if not isinstance(name, str) or not text.startswith(":", at):
        raise NoJson("a member of the object has no name")
    begin = skip_space(text, at + 1)
    value, end = read_value(text, begin)
    return (name, Member(value, text[begin:end])), end


def read_objects(text: str, at: int) -> tuple[list[dict[str, Member]], int]:
    """The JSON list of objects that begins at `at`, and the place behind it.

    Raises:
        NoJson: there is none, it is not complete, or it holds something else.
    """
    return _read_items(text, at, ("[", "]", "list"), read_object)


def _read_items(
    text: str, at: int, form: tuple[str, str, str], read_item: Callable[[str, int], tuple[Item, int]]
) -> tuple[list[Item], int]:
    """Items with commas between them, and the place behind them; `form` is what opens and closes them, and its name."""
    opening, closing, kind = form
    if not text.startswith(opening, at):
        raise NoJson(f"there is no {kind}")
    items: list[Item] = []
    at = skip_space(text, at + 1)
    if text.startswith(closing, at):
        return items, at + 1
    while True:
        item, end = read_item(text, at)
        items.append(item)
        at = skip_space(text, end)
        if text.startswith(closing, at):
            return items, at + 1
        if not text.startswith(",", at):
            raise NoJson(f"the {kind} does not end")
        at = skip_space(text, at + 1)


def arguments_of(members: Mapping[str, Member], *names: str) -> str:
    """The arguments of a call, the first of `names` that is there, as a JSON text; "{}" where there are none.

    Some models write the object as a text within the text.

    Raises:
        NoJson: they are no object.
    """
    member = next((members[name] for name in names if name in members), None)
    if member is None:
        return "{}"
    if isinstance(member.value, str):
        inner = member.value
        value, end = read_value(inner, skip_space(inner, 0))
        if not isinstance(value, dict) or skip_space(inner, end) != len(inner):
            raise NoJson("the arguments are no object")
        return inner
    if not isinstance(member.value, dict):
        raise NoJson("the arguments are no object")
    return member.written


def name_of(members: Mapping[str, Member]) -> str:
    """The name of the function that is called.

    Raises:
        NoJson: there is none.
    """
    member = members.get("name")
    if member is None or not isinstance(member.value, str) or not member.value:
        raise NoJson("the call names no function")
    return member.value


def _refuse_constant(name: str) -> NoReturn:
    raise NoJson(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
