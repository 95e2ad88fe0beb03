"""The rows of a run as the page shows them: which of them, what each says, and packed for the browser."""

from __future__ import annotations

import base64
import gzip
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchgen.checkpoint import Places
from batchgen.checkpoint.done import FAILED, GOOD
from batchgen.report.batches import Batches
from batchgen.requests.output import RESULT, WANTED, failure_of

_CHUNK = 1000  # rows that a browser unpacks at once
_ENDINGS = ("stop", "length")
_LEFT_OUT = {*RESULT, *WANTED} - {"texts"}  # what a row's other columns are not


@dataclass(slots=True)
class TableRow:
    """What one line of a generations file says."""

    id: str
    prompt: str  # "" where the line does not hold it: an OpenAI answer
    text: str  # of a failed row its error's message
    ending: str  # stop, length, or the type of its error
    failed: bool
    prompt_tokens: int
    generated_tokens: int
    columns: str  # the row's other columns as JSON, or ""


def choose(states: bytearray, max_rows: int) -> list[int]:
    """The failed and the good rows that the table has, in ascending order.

    It has `max_rows` of each; where there are more, they are a uniform sample.
    """
    numbers: list[int] = []
    draw = random.Random(0)  # the same page again from the same folder
    for state in (FAILED, GOOD):
        rows = _rows_in(states, state)
        numbers += (rows if len(rows) <= max_rows else rows[draw.sample(range(len(rows)), max_rows)]).tolist()
    return sorted(numbers)


def _rows_in(states: bytearray, state: int) -> NDArray[np.int64]:
    """Numbers of the rows in that state: 8 bytes each, where a list would take 36."""
    return np.flatnonzero(np.frombuffer(states, dtype=np.uint8) == state).astype(np.int64, copy=False)


def read(line: bytes, prompt_column: str | None) -> TableRow:
    """What `line` says: a plain row, or OpenAI's answer to a request.

    Args:
        prompt_column: the column that was named to be the prompt.
    """
    row = json.loads(line)
    return _plain(row, prompt_column) if "finish_reason" in row else _answer(row)


def _plain(row: dict[str, Any], prompt_column: str | None) -> TableRow:
    own = {name: value for name, value in row.items() if name not in _LEFT_OUT}
    name = next((name for name in _names(prompt_column) if name in own), None)
    error = row["error"]
    return TableRow(
        id=str(row["id"]),
        prompt="" if name is None else _conversation(own.pop(name)),
        text=row["text"] or "" if error is None else str(error["message"]),
        ending=str(row["finish_reason"] if error is None else error["type"]),
        failed=error is not None,
        prompt_tokens=int(row["prompt_tokens"]),
        generated_tokens=int(row["generated_tokens"]),
        columns=json.dumps(own, ensure_ascii=False) if own else "",
    )


def _names(prompt_column: str | None) -> Iterator[str]:
    if prompt_column is not None:
        yield f"input_{prompt_column}" if prompt_column in (*RESULT, *WANTED) else prompt_column
    yield from ("prompt", "messages")


def _conversation(value: object) -> str:
    """A prompt as a person reads it."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        turns = [(turn["role"], turn.get("content")) for turn in value]
        if len(turns) == 1 and isinstance(turns[0][1], str):
            return turns[0][1]
        return "\n\n".join(f"{role}: {text if isinstance(text, str) else json.dumps(text)}" for role, text in turns)
    return json.dumps(value, ensure_ascii=False)


def _answer(row: dict[str, Any]) -> TableRow:
    body = (row.get("response") or {}).get("body") or {}
    failure = failure_of(row)
    usage = body.get("usage") or {}
    choice = (body.get("choices") or [{}])[0]
    text = choice.get("text", (choice.get("message") or {}).get("content"))
    ending = choice.get("finish_reason")
    if failure is not None:
        text = failure.get("message")
        ending = next((failure[name] for name in ("code", "type") if isinstance(failure.get(name), str)), "error")
    return TableRow(
        id=str(row.get("custom_id")),
        prompt="",
        text=str(text or ""),
        ending=str(ending),
        failed=failure is not None,
        prompt_tokens=int(usage.get("prompt_tokens", 0)),
        generated_tokens=int(usage.get("completion_tokens", 0)),
        columns="",
    )


@dataclass
class Kind:
    """One kind of error."""

    type: str
    count: int
    row: int  # the first one
    id: str
    message: str


@dataclass
class Rows:
    """Figures of the rows that were read, and their texts packed."""

    row_numbers: list[int] = field(default_factory=list)  # ascending
    ids: list[str] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)
    failed: list[bool] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    generated_tokens: list[int] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)  # of the batch it was finished in
    chunks: list[str] = field(default_factory=list)  # base64 of gzip of JSON, `_CHUNK` rows each
    good: int = 0  # rows of the run, read or not
    cut: int = 0  # rows of which something was left out
    without_prompt: int = 0
    kinds: list[Kind] = field(default_factory=list)  # the most frequent first

    def index(self) -> str:
        """What the table is sorted and paged by, packed like a chunk."""
        names = sorted(set(self.endings))
        numbers = {name: number for number, name in enumerate(names)}
        return _packed(
            {
                "chunk": _CHUNK,
                "names": names,
                "row": self.row_numbers,
                "id": self.ids,
                "ending": [numbers[ending] for ending in self.endings],
                "failed": [int(failed) for failed in self.failed],
                "prompt": self.prompt_tokens,
                "generated": self.generated_tokens,
                "seconds": self.seconds,
            }
        )


def gather(places: Places, batches: Batches, prompt_column: str | None, max_rows: int, characters: int) -> Rows:
    """Reads the rows that `choose` gives, and the kind of error of every failed row.

    Args:
        max_rows: the most rows of each state that the table has.
        characters: the most characters of a text that the table keeps.
    """
    rows, block = Rows(good=places.states.count(GOOD)), []
    for row, line in places.lines(choose(places.states, max_rows)):
        values = read(line, prompt_column)
        rows.row_numbers.append(row)
        rows.ids.append(values.id)
        rows.endings.append(values.ending)
        rows.failed.append(values.failed)
        rows.prompt_tokens.append(values.prompt_tokens)
        rows.generated_tokens.append(values.generated_tokens)
        rows.without_prompt += not values.prompt
        texts = [_cut(text, characters) for text in (values.prompt, values.text, values.columns)]
        rows.cut += any(is_cut for _, is_cut in texts)
        block.append([part for pair in texts for part in pair])
        if len(block) == _CHUNK:
            rows.chunks.append(_packed(block))
            block = []
    if block:
        rows.chunks.append(_packed(block))
    rows.seconds = _seconds(places, batches, rows.row_numbers)
    rows.kinds = _kinds(places, prompt_column)
    return rows


def _cut(text: str, characters: int) -> tuple[str, int]:
    """`text`, at most so long, and how many characters were left out."""
    return text[:characters], max(len(text) - characters, 0)


def _packed(value: object) -> str:
    data = json.dumps(value, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode("ascii")


def _seconds(places: Places, batches: Batches, rows: Sequence[int]) -> list[float | None]:
    by_file: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_file.setdefault(places.file[row], []).append(number)
    seconds_of_row: list[float | None] = [None] * len(rows)
    for file, numbers in by_file.items():
        seconds = batches.seconds_of(places.files[file], [places.begin[rows[number]] for number in numbers])
        for number, value in zip(numbers, seconds.tolist(), strict=True):
            seconds_of_row[number] = round(value, 3) if value == value else None
    return seconds_of_row


def _kinds(places: Places, prompt_column: str | None) -> list[Kind]:
    kinds: dict[str, Kind] = {}
    for row, line in places.lines(_rows_in(places.states, FAILED).tolist()):
        values = read(line, prompt_column)
        kind = kinds.setdefault(values.ending, Kind(values.ending, 0, row, values.id, values.text))
        kind.count += 1
    return sorted(kinds.values(), key=lambda kind: -kind.count)


def endings(rows: Rows) -> Mapping[str, int]:
    """How many of the good rows ended in each way."""
    good = [ending for ending, failed in zip(rows.endings, rows.failed, strict=True) if not failed]
    return {name: good.count(name) for name in _ENDINGS}
