"""One line of a generations file, read for the page: a plain row, or OpenAI's answer to a request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from batchgen.requests.output import RESULT, WANTED, failure_of

_LEFT_OUT = {*RESULT, *WANTED}  # what a row's other columns are not
_SAMPLES = 16  # of one row that the page shows

# vLLM's errors have the same type for every bad request, so that the sentence alone tells this one.
_REFUSED_CONSTRAINT = re.compile(
    r": the (schema|regular expression|choice|grammar) (uses .*, which cannot be enforced;|cannot be enforced:)"
    r"|: the constraint could not be followed:"
)


class Part(NamedTuple):
    """What a row has beside its prompt, its text and its columns: thinking, calls of tools, further samples."""

    title: str
    text: str


class _Said(NamedTuple):
    """One sample."""

    text: str
    thinking: str
    calls: Sequence[str]  # as a programmer writes them


@dataclass(slots=True)
class TableRow:
    """What one line says."""

    id: str
    prompt: str  # "" where the line does not hold it: an OpenAI answer
    text: str  # of a failed row its error's message
    ending: str  # stop, length, tool_calls, or the type of its error
    failed: bool
    prompt_tokens: int
    generated_tokens: int
    columns: str  # the row's other columns as JSON, or ""
    parts: Sequence[Part] = ()
    samples: int = 1
    left_out: int = 0  # samples that are not among `parts`
    calls: int = 0  # of all samples


def read(line: bytes, prompt_column: str | None) -> TableRow:
    """What `line` says.

    Args:
        prompt_column: the column that was named to be the prompt.
    """
    row = json.loads(line)
    return _plain(row, prompt_column) if "finish_reason" in row else _answer(row)


def _plain(row: Mapping[str, Any], prompt_column: str | None) -> TableRow:
    own = {name: value for name, value in row.items() if name not in _LEFT_OUT}
    name = next((name for name in _names(prompt_column) if name in own), None)
    prompt = "" if name is None else _conversation(own.pop(name))
    columns = json.dumps(own, ensure_ascii=False) if own else ""
    counts = int(row["prompt_tokens"]), int(row["generated_tokens"])
    error = row["error"]
    if error is not None:
        return TableRow(str(row["id"]), prompt, str(error["message"]), str(error["type"]), True, *counts, columns)
    said = _samples(row)
    read = TableRow(str(row["id"]), prompt, said[0].text, str(row["finish_reason"]), False, *counts, columns)
    return _with_parts(read, said)


def _samples(row: Mapping[str, Any]) -> list[_Said]:
    """What each sample says. The lists of all samples are there where a row has several."""
    texts = row.get("texts")
    if not isinstance(texts, list) or not texts:  # a column of a folder from before there were samples, perhaps
        return [_said(row["text"], row.get("reasoning"), row.get("tool_calls"))]
    thinking, calls = row.get("texts_reasoning"), row.get("texts_tool_calls")
    return [_said(text, _at(thinking, place), _at(calls, place)) for place, text in enumerate(texts)]


def _at(values: object, place: int) -> object:
    """The sample's own; a list is left out where no sample has anything for it."""
    return values[place] if isinstance(values, list) and place < len(values) else None


def _names(prompt_column: str | None) -> Iterator[str]:
    if prompt_column is not None:
        yield f"input_{prompt_column}" if prompt_column in (*RESULT, *WANTED) else prompt_column
    yield from ("prompt", "messages")


def _conversation(value: object) -> str:
    """A prompt as a person reads it."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        if len(value) == 1 and isinstance(value[0].get("content"), str):
            return str(value[0]["content"])
        return "\n\n".join(f"{turn['role']}: {_turn(turn)}" for turn in value)
    return json.dumps(value, ensure_ascii=False)


def _turn(turn: Mapping[str, Any]) -> str:
    """A message, with the calls of tools in it."""
    content, calls = turn.get("content"), _calls(turn.get("tool_calls"))
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return "\n".join([*([text] if content else []), *calls]) if calls else text


def _answer(row: Mapping[str, Any]) -> TableRow:
    body = (row.get("response") or {}).get("body") or {}
    usage = body.get("usage") or {}
    name = str(row.get("custom_id"))
    counts = (
        int(usage.get("prompt_tokens", usage.get("input_tokens", 0))),
        int(usage.get("completion_tokens", usage.get("output_tokens", 0))),
    )
    failure = failure_of(row)
    if failure is not None:
        return TableRow(name, "", str(failure.get("message") or ""), _type_of(failure), True, *counts, "")
    if "output" in body:  # a Response
        ending = "length" if body.get("status") == "incomplete" else "stop"
        said = [_of_response(body["output"])]
    else:
        choices = body.get("choices") or [{}]
        ending, said = str(choices[0].get("finish_reason")), [_of_choice(choice) for choice in choices]
    return _with_parts(TableRow(name, "", said[0].text, ending, False, *counts, ""), said)


def _type_of(failure: Mapping[str, Any]) -> str:
    if _REFUSED_CONSTRAINT.search(str(failure.get("message"))):
        return "constraint"
    return next((failure[key] for key in ("code", "type") if isinstance(failure.get(key), str)), "error")


def _of_choice(choice: Mapping[str, Any]) -> _Said:
    message = choice.get("message") or {}
    text = choice.get("text", message.get("content"))
    return _said(text, message.get("reasoning_content"), message.get("tool_calls"))


def _of_response(output: Sequence[Mapping[str, Any]]) -> _Said:
    texts: dict[str, str] = {"message": "", "reasoning": ""}
    for item in output:
        kind = str(item.get("type"))
        texts[kind] = texts.get(kind, "") + "".join(str(part.get("text", "")) for part in item.get("content") or ())
    return _said(texts["message"], texts["reasoning"], None)


def _said(text: object, thinking: object, calls: object) -> _Said:
    return _Said(str(text or ""), thinking if isinstance(thinking, str) else "", _calls(calls))


def _calls(calls: object) -> list[str]:
    """Calls of tools, as a programmer writes them: `weather({"city": "Bonn"})`."""
    functions = [call.get("function") for call in (calls if isinstance(calls, list) else ()) if isinstance(call, dict)]
    return [f"{each.get('name')}({_arguments(each.get('arguments'))})" for each in functions if isinstance(each, dict)]


def _arguments(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _with_parts(row: TableRow, said: Sequence[_Said]) -> TableRow:
    """The row with all that its samples say beside the text of the first one."""
    parts: list[Part] = []
    for number, sample in enumerate(said[:_SAMPLES], 1):
        suffix = f" of sample {number}" if number > 1 else ""
        parts += [
            Part(f"thinking{suffix}", sample.thinking),
            Part(f"sample {number}" if number > 1 else "", sample.text),
            Part(f"tool calls{suffix}", "\n".join(sample.calls)),
        ]
    row.parts = [part for part in parts if part.title and (part.text or part.title.startswith("sample"))]
    row.samples = len(said)
    row.left_out = max(len(said) - _SAMPLES, 0)
    row.calls = sum(len(sample.calls) for sample in said)
    return row
