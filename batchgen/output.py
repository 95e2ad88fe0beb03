"""One generation as one line of a generations file: a plain row, or OpenAI's answer to an OpenAI line."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
from collections.abc import Callable, Mapping
from typing import Literal

from batchgen import openai
from batchgen.types import Generation

ErrorFormat = Literal["openai", "vllm"]

RESULT = ("id", "index", "text", "finish_reason", "prompt_tokens", "generated_tokens", "error")
"""What batchgen adds to a row, in this order. A column of the input with such a name is carried as `input_NAME`, apart
from `id`, which is the row's own."""

_RESULT = frozenset(RESULT)

# JSON lets these stand, but str.splitlines and its like in other languages take them for the end of a line.
_LINE_ENDS = {ord(letter): f"\\u{ord(letter):04x}" for letter in "\x85\u2028\u2029"}


def renderer(
    model: str, created: int, error_format: ErrorFormat, answers_requests: bool
) -> Callable[[Generation], bytes]:
    """A function from a generation to its line, final newline included.

    Args:
        model: the name that OpenAI's answers carry.
        created: Unix time of the run's first start, for OpenAI's answers: a resumed run writes the same lines.
        error_format: shape of the answers to OpenAI lines that fail.
        answers_requests: the input is an OpenAI batch file: a line that is unreadable gets OpenAI's answer too.
    """

    def render(generation: Generation) -> bytes:
        if generation.request is not None or (answers_requests and generation.error is not None):
            value = openai.answer(generation, model, created, error_format)
        else:
            value = plain(generation)
        try:
            text = _encode(value)
        except ValueError:  # NaN and infinity, which Parquet may hold and JSON may not
            text = _encode(_finite(value))
        if not text.isascii():
            text = text.translate(_LINE_ENDS)
        return text.encode("utf-8", "backslashreplace") + b"\n"

    return render


def plain(generation: Generation) -> dict[str, object]:
    """The merged row: the result, then the row's own columns."""
    error = generation.error
    columns = generation.columns
    if not _RESULT.isdisjoint(columns):
        columns = {f"input_{name}" if name in _RESULT else name: value for name, value in columns.items()}
    return {
        "id": generation.id,
        "index": generation.index,
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "generated_tokens": generation.generated_tokens,
        "error": None if error is None else {"type": error.type, "message": error.message, "line": error.line},
        **columns,
    }


def _text_of(value: object) -> object:
    """JSON for the types that Parquet and Arrow have and JSON has not."""
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_text_of).encode


def _finite(value: object) -> object:
    """`value` with null for every number that JSON cannot write."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value
