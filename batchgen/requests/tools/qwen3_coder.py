"""`<tool_call><function=NAME><parameter=KEY>` value `</parameter></function></tool_call>`: Qwen3-Coder, Qwen 3.5.

A value is plain text: the function's schema says what is meant. A line break at each side of it belongs to the form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from batchgen.requests.tools._form import Call, Functions, ParsedCalls, join_content
from batchgen.requests.tools._json import NoJson, read_value, skip_space

MARKS: tuple[str, ...] = ("<tool_call>", "</tool_call>", "<function=", "<parameter=", "</function>", "</parameter>")

_BLOCK = re.compile(r"<tool_call>\s*|\s*</tool_call>")
_FUNCTION = re.compile(r"<function=([^>\n]+)>")
_FUNCTION_END = "</function>"
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def is_in(template: str) -> bool:
    """Whether a chat template writes calls in this form."""
    return "<function=" in template and "<parameter=" in template


def find_calls(text: str, functions: Functions) -> ParsedCalls | None:
    """The calls in `text`; None: there are none, or one of them cannot be read."""
    pieces, calls, at = [], [], 0
    while match := _FUNCTION.search(text, at):
        pieces.append(text[at : match.start()])
        name, at = match[1].strip(), skip_space(text, match.end())
        values: dict[str, object] = {}
        while parameter := _PARAMETER.match(text, at):
            key = parameter[1].strip()
            values[key] = _cast(parameter[2], _schema_of(functions.get(name, {}), key))
            at = skip_space(text, parameter.end())
        if not text.startswith(_FUNCTION_END, at):
            return None
        at += len(_FUNCTION_END)
        calls.append(Call(name, json.dumps(values, ensure_ascii=False)))
    return (
        ParsedCalls(join_content([_BLOCK.sub("", piece) for piece in [*pieces, text[at:]]]), calls) if calls else None
    )


def _schema_of(parameters: Mapping[str, object], key: str) -> Mapping[str, object]:
    properties = parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    return schema if isinstance(schema, Mapping) else {}


def _cast(text: str, schema: Mapping[str, object]) -> object:
    """The value that is meant by `text`: itself where the schema allows texts, or says nothing; else read as JSON."""
    types = _types_of(schema)
    if text == "null" and "null" in types:
        return None
    if not types or "string" in types:
        return text
    written = text.strip()
    if "boolean" in types and written.lower() in ("true", "false"):
        return written.lower() == "true"
    try:
        value, end = read_value(written, 0)
    except NoJson:
        return text
    return value if end == len(written) else text


def _types_of(schema: Mapping[str, object]) -> set[str]:
    """The JSON types that a schema allows, as far as it says so by `type`, `anyOf`, `oneOf`, `enum` and `const`."""
    own = schema.get("type")
    types = {each for each in (own if isinstance(own, list) else [own]) if isinstance(each, str)}
    for key in ("anyOf", "oneOf"):
        branches = schema.get(key)
        for branch in branches if isinstance(branches, list) else ():
            types |= _types_of(branch) if isinstance(branch, Mapping) else set()
    if not types:
        enum = schema.get("enum")
        values = [*(enum if isinstance(enum, list) else ()), *([schema["const"]] if "const" in schema else ())]
        types = {"string" if isinstance(value, str) else "null" if value is None else "other" for value in values}
    return types
