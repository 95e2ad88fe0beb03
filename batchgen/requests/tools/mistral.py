"""`[TOOL_CALLS]` and a JSON list of `{"name": …, "arguments": {…}}`, or `[TOOL_CALLS]name[ARGS]{…}` for each call.

Mistral's tokenizers write the first up to version 10, the second from version 11 on.
"""

from __future__ import annotations

import re

from batchgen.requests.tools._form import Call, Functions, ParsedCalls
from batchgen.requests.tools._json import NoJson, arguments_of, name_of, read_object, read_objects, skip_space

_MARK = "[TOOL_CALLS]"
MARKS: tuple[str, ...] = (_MARK, "[ARGS]", "[CALL_ID]")
_NAMED = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")


def is_in(template: str) -> bool:
    """Whether a chat template writes calls in this form."""
    return _MARK in template


def find_calls(text: str, functions: Functions) -> ParsedCalls | None:
    """The calls in `text`; None: there are none, or one of them cannot be read."""
    content, mark, rest = text.partition(_MARK)
    if not mark:
        return None
    try:
        calls = _read_list(rest) if rest.lstrip().startswith("[") else _read_named(rest)
    except NoJson:
        return None
    return ParsedCalls(content.strip(), calls) if calls else None


def _read_list(text: str) -> list[Call]:
    objects, end = read_objects(text, skip_space(text, 0))
    if skip_space(text, end) != len(text):
        raise NoJson("something stands behind the list of calls")
    return [Call(name_of(members), arguments_of(members, "arguments")) for members in objects]


def _read_named(text: str) -> list[Call]:
    calls, at = [], skip_space(text, 0)
    while at < len(text):
        match = _NAMED.match(text, at)
        if match is None:
            raise NoJson("the call names no function")
        _, end = read_object(text, match.end())
        calls.append(Call(match[1], text[match.end() : end]))
        at = skip_space(text, end)
        if text.startswith(_MARK, at):
            at = skip_space(text, at + len(_MARK))
    return calls
