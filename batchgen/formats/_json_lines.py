"""One line of JSON as the object that it holds, or the error row that says why it holds none.

Stricter than Python's json: no NaN, no number that overflows, no key twice in an object, no half of a surrogate pair,
and nothing nested so deeply that it could not be written again. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import chain
from math import isinf
from typing import Any, Never

from batchgen.types import RowError

DEEPEST = 200  # levels of lists and objects; Python's json reads about 1000, but cannot write as many everywhere
_TOO_DEEP = f"has lists or objects more than {DEEPEST} levels deep"
BOM = b"\xef\xbb\xbf"


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if isinf(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python's own sentence is about how to change Python
        raise ValueError(f"a number of {len(text)} digits is too long") from None


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {json.dumps(twice[:60])} twice, and only one can be meant")
    return values


DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole, object_pairs_hook=_distinct
)
"""Raises ValueError or RecursionError over what is no good JSON, but not over what `writable` finds."""


def read_carefully(raw: bytes, line: int, name: str) -> dict[str, object] | RowError:
    """The object in `raw`, or the error row that says what is wrong with it."""
    raw = raw.removeprefix(BOM)  # files put together keep theirs
    try:
        value = DECODER.decode(raw.decode())
    except UnicodeDecodeError as error:
        why = f"is not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}"
    except json.JSONDecodeError as error:
        hint = "; lines must end in LF or CRLF, not in CR alone" if b"\r" in raw.strip() else ""
        what = error.msg.removesuffix(" at")
        why = f"is not valid JSON: {what} at column {error.pos + 1}{hint}"
    except RecursionError:
        why = _TOO_DEEP
    except ValueError as error:
        why = f"is not valid JSON: {error}"
    else:
        if not isinstance(value, dict):
            return RowError("wrong_type", f"line {line} of {name} holds {_KINDS[type(value)]}, not an object", line)
        return writable(value, line, name)
    return _malformed(line, name, why, _find_id(raw))


def writable(value: dict[str, object], line: int, name: str) -> dict[str, object] | RowError:
    """`value`, if it can be written as JSON again."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        parts = chain.from_iterable(part.values() if isinstance(part, dict) else part for part in level)
        level = [part for part in parts if isinstance(part, (dict, list))]
    if level:
        return _malformed(line, name, _TOO_DEEP, _id_in(value.items()))
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        why = f"has {half} in a text: half of a surrogate pair, which is no character in UTF-8"
        return _malformed(line, name, why, _id_in(value.items()))
    return value


def _malformed(line: int, name: str, why: str, own_id: str | None) -> RowError:
    return RowError("malformed_json", f"line {line} of {name} {why}", line, own_id)


def _find_id(raw: bytes) -> str | None:
    """The id of a line that is no good JSON: of the object that a less strict reader finds, else of its first key."""
    text = raw.decode("utf-8", "replace")
    outermost: list[tuple[str, object]] = []

    def remember(pairs: list[tuple[str, object]]) -> dict[str, object]:
        outermost[:] = pairs
        return dict(pairs)

    try:
        return _id_in(outermost) if isinstance(json.loads(text, object_pairs_hook=remember), dict) else None
    except (ValueError, RecursionError):
        first = _FIRST_KEY.match(text)
        return _id_in([(first[1], json.loads(first[2]))]) if first is not None else None


def _id_in(pairs: Iterable[tuple[str, object]]) -> str | None:
    """The id among the keys of a row, if there is one, and only one."""
    pairs = list(pairs)
    is_request = any(key in ("body", "url") for key, _ in pairs)
    for name in ("custom_id", "id") if is_request else ("id", "custom_id"):
        values = {str(own) for key, own in pairs if key == name and type(own) in (str, int) and own != ""}
        if len(values) == 1:
            own = values.pop()
            return None if _UNREADABLE.search(own) else own
    return None


_FIRST_KEY = re.compile(r'\s*\{\s*"(custom_id|id)"\s*:\s*("[^"\\\x00-\x1f]*"|(?:0|[1-9]\d{0,17})(?=\s*,))')
_UNREADABLE = re.compile("[\ufffd\ud800-\udfff]")

_KINDS = {
    list: "a list",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
