"""One generation as one line of a generations file: a plain row, or OpenAI's answer to an OpenAI line."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal

from batchgen.requests import openai
from batchgen.requests.openai_message import Message, read_message
from batchgen.requests.token_texts import to_text
from batchgen.types import MACHINE_ERRORS, Alternative, Details, Generation

ErrorFormat = Literal["openai", "vllm"]

RESULT = ("id", "index", "text", "finish_reason", "prompt_tokens", "generated_tokens", "error")
"""What batchgen adds to a row, in this order."""

WANTED = (
    *("texts", "finish_reasons", "logprobs", "texts_logprobs", "top_logprobs", "prompt_logprobs"),
    *("token_ids", "texts_token_ids", "prompt_token_ids", "stop_reason"),
    *("reasoning", "tool_calls", "texts_reasoning", "texts_tool_calls"),
)
"""Come behind these, in this order, in rows that ask for them alone: the others are as they always were."""

_NAMES = (*RESULT, *WANTED)
_CLASHES = frozenset(_NAMES) - {"id"}  # a row's own id is the result's

# JSON lets these stand, but str.splitlines and its like in other languages take them for the end of a line.
# Looked for one by one: `str.translate` takes twenty times as long for a text without them.
_LINE_ENDS = [(letter, f"\\u{ord(letter):04x}") for letter in "\x85\u2028\u2029"]


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
            text = _json(openai.answer(generation, model, created, error_format))
        else:
            text = _plain(generation)
        if not text.isascii():
            for letter, escape in _LINE_ENDS:
                text = text.replace(letter, escape)
        return text.encode("utf-8", "backslashreplace") + b"\n"

    return render


def _plain(generation: Generation) -> str:
    """The merged row: the result, what the row has asked for, and its own columns. `RESULT` and `WANTED` are the names.

    Put together by hand, since the encoder takes half as long again for the same object.
    """
    columns = generation.columns
    if not _CLASHES.isdisjoint(columns):
        names = carried(columns)
        columns = {names[name]: value for name, value in columns.items()}
    error = generation.error
    failure = error and {"type": error.type, "message": error.message, "line": error.line}  # its id is the row's
    own = "".join(f",{_quoted(name)}:{_any(value)}" for name, value in columns.items() if name != "id")
    generated = generation.generated_tokens
    wanted = ""
    said = _said(generation)
    text, reason = (said[0].content, said[0].finish_reason) if said else (generation.text, generation.finish_reason)
    if said or generation.logprobs is not None or generation.details is not None or generation.others:
        wanted = "".join(f',"{name}":{_json(value)}' for name, value in _wanted(generation, said).items())
        generated += sum(sample.generated_tokens for sample in generation.others)
    return (
        f'{{"id":{_quoted(generation.id)},"index":{generation.index},'
        f'"text":{"null" if text is None else _quoted(text)},'
        f'"finish_reason":{"null" if reason is None else _quoted(reason)},'
        f'"prompt_tokens":{generation.prompt_tokens},"generated_tokens":{generated},'
        f'"error":{"null" if failure is None else _json(failure)}{wanted}{own}}}'
    )


def _said(generation: Generation) -> Sequence[Message]:
    """What each sample says, where the model may have written more than its answer."""
    if generation.markup is None or generation.error is not None:
        return ()
    return [read_message(sample) for sample in (generation, *generation.others)]


def _wanted(generation: Generation, said: Sequence[Message]) -> dict[str, object]:
    """What stands in the row beside its text, by the names in `WANTED` and in their order.

    Where a row has several samples, the other values are those of the first one, and lists of all of them stand beside
    its log-probabilities and its token ids.
    """
    details = generation.details or Details()
    values: dict[str, object] = {
        "logprobs": generation.logprobs,
        "top_logprobs": _alternatives(details.top_logprobs),
        "prompt_logprobs": _alternatives(details.prompt_logprobs),
        "token_ids": details.token_ids,
        "prompt_token_ids": details.prompt_token_ids,
        "stop_reason": details.stop_reason,
    }
    if said:
        values |= {"reasoning": said[0].reasoning, "tool_calls": said[0].tool_calls or None}
    if generation.others:
        samples = [generation, *generation.others]
        values["texts"] = [each.content for each in said] or [sample.text for sample in samples]
        values["finish_reasons"] = [each.finish_reason for each in said or samples]
        if any(each.reasoning is not None for each in said):
            values["texts_reasoning"] = [each.reasoning for each in said]
        if any(each.tool_calls for each in said):
            values["texts_tool_calls"] = [each.tool_calls for each in said]
        if generation.logprobs is not None:
            values["texts_logprobs"] = [sample.logprobs for sample in samples]
        if details.token_ids is not None:
            values["texts_token_ids"] = [sample.details and sample.details.token_ids for sample in samples]
    return {name: values[name] for name in WANTED if values.get(name) is not None}


def _alternatives(places: Sequence[Sequence[Alternative] | None] | None) -> list[object] | None:
    """Each token of each place as an object."""
    if places is None:
        return None
    return [
        place
        and [
            {"token": each.token, "text": to_text(each.text), "logprob": each.logprob, "rank": each.rank}
            for each in place
        ]
        for place in places
    ]


def failure_of(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a row of the output says of its failure, with its `message`, in whichever shape; None: it has not failed."""
    failure = row.get("error") or ((row.get("response") or {}).get("body") or {}).get("error")
    while isinstance(failure, dict) and isinstance(failure.get("error"), dict):
        failure = failure["error"]
    return failure if failure is None or isinstance(failure, dict) else {"message": failure}


def may_succeed(row: Mapping[str, Any]) -> bool:
    """Whether a failed row of the output may be good at another start, without a change of the input."""
    answered = row.get("response")
    if isinstance(answered, dict):
        return int(answered.get("status_code") or 0) >= HTTPStatus.INTERNAL_SERVER_ERROR
    return (failure_of(row) or {}).get("type") in MACHINE_ERRORS


def _any(value: object) -> str:
    if type(value) is str:
        return _quoted(value)
    if type(value) is bool:
        return "true" if value else "false"
    return str(value) if type(value) is int else _json(value)


def carried(columns: Iterable[str]) -> dict[str, str]:
    """The name in the output of each column of the input. Its `id` is the result's.

    A column with the name of a result gets `input_` in front, as often as no other column has that name.
    """
    names = {name: name for name in columns}
    for name in _NAMES:
        if name in names and name != "id":
            other = f"input_{name}"
            while other in names:
                other = f"input_{other}"
            names[name] = other
    return names


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


_quoted = json.encoder.encode_basestring
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_text_of).encode


def _json(value: object) -> str:
    try:
        return _encode(value)
    except ValueError:  # NaN and infinity, which Parquet may hold and JSON may not
        return _encode(_finite(value))


def _finite(value: object) -> object:
    """`value` with null for every number that JSON cannot write."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value
