"""The rows of a run as the page shows them: which of them, what each says, and packed for the browser."""

from __future__ import annotations

import base64
import gzip
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from batchgen.checkpoint import Places
from batchgen.checkpoint.done import FAILED, GOOD
from batchgen.report.batches import Batches
from batchgen.report.lines import TableRow, read

_CHUNK = 1000  # rows that a browser unpacks at once
_ENDINGS = ("stop", "length")


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
    with_samples: int = 0  # good rows that have several texts
    samples: int = 0  # the texts of these
    with_calls: int = 0  # good rows that call tools
    calls: int = 0  # the calls of these
    cut: int = 0  # rows of which something was left out
    without_prompt: int = 0
    kinds: list[Kind] = field(default_factory=list)  # the most frequent first

    def count(self, row: TableRow) -> None:
        """Counts what a row has beside its text."""
        if row.failed:
            return
        self.with_samples += row.samples > 1
        self.samples += row.samples if row.samples > 1 else 0
        self.with_calls += row.calls > 0
        self.calls += row.calls

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
    rows = Rows(good=places.states.count(GOOD))
    block: list[list[object]] = []
    for row, line in places.lines(choose(places.states, max_rows)):
        values = read(line, prompt_column)
        rows.row_numbers.append(row)
        rows.ids.append(values.id)
        rows.endings.append(values.ending)
        rows.failed.append(values.failed)
        rows.prompt_tokens.append(values.prompt_tokens)
        rows.generated_tokens.append(values.generated_tokens)
        rows.without_prompt += not values.prompt
        rows.count(values)
        entry, is_cut = _entry(values, characters)
        rows.cut += is_cut
        block.append(entry)
        if len(block) == _CHUNK:
            rows.chunks.append(_packed(block))
            block = []
    if block:
        rows.chunks.append(_packed(block))
    rows.seconds = _seconds(places, batches, rows.row_numbers)
    rows.kinds = _kinds(places, prompt_column)
    return rows


def _entry(row: TableRow, characters: int) -> tuple[list[object], bool]:
    """The texts of a row as `page.js` reads them, and whether something of them is left out.

    They are prompt, characters cut, text, characters cut, columns, characters cut; then, if the row has further parts,
    a list of [title, text, characters cut].
    """
    texts = [_cut(text, characters) for text in (row.prompt, row.text, row.columns)]
    parts = [(part.title, *_cut(part.text, characters)) for part in row.parts]
    entry: list[object] = [part for pair in texts for part in pair]
    is_cut = any(cut for _, cut in texts) or any(cut for *_, cut in parts)
    if row.left_out:
        parts.append(("further samples", f"{row.left_out:,}, which this page leaves out", 0))
    return [*entry, parts] if parts else entry, is_cut


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
