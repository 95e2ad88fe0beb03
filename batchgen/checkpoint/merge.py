"""The output files: every row once, in input order, by atomic rename.

generations.jsonl (or .parquet, .arrow)      every row, failed ones in their place
errors.jsonl                                 the failed rows again
timing.jsonl                                 the batches: attempt by attempt, stream by stream, oldest first
merged.json                                  which batches these have, so that more recorded ones show
"""

from __future__ import annotations

import errno
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from batchgen.checkpoint.done import FAILED, GOOD, OPEN, check_rows
from batchgen.checkpoint.files import CheckpointError, to_json
from batchgen.checkpoint.folder import GENERATIONS, RunFolder
from batchgen.files import replacing, write_atomic
from batchgen.types import BatchRecord

# Rows gathered at once: few reads, and some MB of text.
_BLOCK = 4096
# Text read for a block, of all files together; where the rows of one lie further apart, each is read alone.
_SPAN = 64 << 20
# Files open at once: a run that was started often has more of them than the 1024 a process may open.
_OPEN_FILES = 256

# Of a batch record, what the reader of timing.jsonl wants; the rest is the commit's own.
_TIMING = [
    name for name in BatchRecord.__slots__ if name not in ("begin", "end", "rows", "failed", "checksum", "incomplete")
]


Lines = Callable[[], Iterator[tuple[int, bytes]]]
"""Row number and line (newline included) of every row, in input order; each call begins anew."""


@dataclass(slots=True)
class Places:
    """Where the winning line of every row lies: 17 bytes a row."""

    files: list[Path]
    states: bytearray  # OPEN, FAILED or GOOD
    file: array[int]
    begin: array[int]
    length: array[int]

    @classmethod
    def find(cls, folder: RunFolder, rows: int) -> Places:
        """The first good line of every row; the last failed one where there is none."""
        zeros = bytes(8 * rows)
        places = cls(
            [], bytearray(rows), array("I", zeros[: 4 * rows]), array("Q", zeros), array("I", zeros[: 4 * rows])
        )
        with closing(_Files(places.files)) as files:
            for path, record in folder.records(verify=True):
                check_rows(path, record, rows)
                if not places.files or places.files[-1] != path:
                    places.files.append(path)
                number = len(places.files) - 1
                places._add(record, number, files.read(number, record.end - record.begin, record.begin))
        return places

    def _add(self, record: BatchRecord, number: int, text: bytes) -> None:
        failed = frozenset(record.failed)
        begin = record.begin
        states, files, begins, lengths = self.states, self.file, self.begin, self.length
        for row, line in zip(
            record.rows, text.split(b"\n"), strict=False
        ):  # one empty piece stands behind the last line
            length = len(line) + 1
            if states[row] != GOOD:
                states[row] = FAILED if row in failed else GOOD
                files[row], begins[row], lengths[row] = number, begin, length
            begin += length

    def lines(self, rows: Sequence[int] | None = None) -> Iterator[tuple[int, bytes]]:
        """Row number and line (newline included) of every row that has one, in input order.

        Args:
            rows: these rows alone, in ascending order.
        """
        numbers = range(len(self.states)) if rows is None else rows
        with closing(_Files(self.files)) as files:
            for start in range(0, len(numbers), _BLOCK):
                rows = [row for row in numbers[start : start + _BLOCK] if self.states[row] != OPEN]
                spans = self._spans(rows, files)
                for row in rows:
                    first, text = spans[self.file[row]]
                    begin, length = self.begin[row], self.length[row]
                    if text is None:
                        yield row, files.read(self.file[row], length, begin)
                    else:
                        yield row, text[begin - first : begin - first + length]

    def failed(self) -> Iterator[tuple[int, bytes]]:
        """Gives the lines of the failed rows alone, as `lines` does."""
        if FAILED in self.states:
            yield from ((row, line) for row, line in self.lines() if self.states[row] == FAILED)

    def _spans(self, rows: list[int], files: _Files) -> dict[int, tuple[int, bytes | None]]:
        """For each file that holds one of `rows`: where the text of its rows begins, and that text."""
        ends: dict[int, tuple[int, int]] = {}
        for row in rows:
            number, begin = self.file[row], self.begin[row]
            first, last = ends.get(number, (begin, begin))
            ends[number] = min(first, begin), max(last, begin + self.length[row])
        share = _SPAN // max(len(ends), 1)
        return {
            number: (first, files.read(number, last - first, first) if last - first <= share else None)
            for number, (first, last) in ends.items()
        }


class _Files:
    """Reads from many files and keeps few of them open. The list may grow meanwhile."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._open: dict[int, int] = {}  # file descriptors, the one used last at the end

    def read(self, number: int, length: int, begin: int) -> bytes:
        """`length` bytes of file `number` from byte `begin`."""
        descriptor = self._open.pop(number, None)
        if descriptor is None:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = os.open(self._paths[number], os.O_RDONLY)
        self._open[number] = descriptor
        data = os.pread(descriptor, length, begin)
        while len(data) < length:  # Linux reads at most 2 GiB at once
            more = os.pread(descriptor, length - len(data), begin + len(data))
            if not more:
                raise OSError(errno.EIO, "the file has become shorter", str(self._paths[number]))
            data += more
        return data

    def close(self) -> None:
        """Closes all files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def merge_with(write: Callable[[Path, Lines], None], folder: RunFolder, rows: int, name: str) -> Path:
    """Writes the output files; gives the path of the generations.

    Rows without a record are left out, which a finished run has none of.

    Args:
        write: puts the rows into a new file at the given path.
        rows: of the input.
        name: of the generations file.

    Raises:
        CheckpointError: the disk is full, say.
    """
    batches = folder.batches()  # before they are read: what comes meanwhile is not merged
    # Those of other formats are as good as this one, or say what is no longer so.
    names = {other for other in GENERATIONS if (folder.path / other).exists()} | {name}
    kept = sorted(names) if folder.merged() else [name]
    places = Places.find(folder, rows)
    output = folder.path / name
    try:
        # Two ranks that end at the same moment both merge; the same bytes under two scratch names do no harm.
        with replacing(output) as scratch:
            write(scratch, places.lines)
        with replacing(folder.path / "errors.jsonl") as scratch:
            write_lines(scratch, places.failed)
        with replacing(folder.path / "timing.jsonl") as scratch:
            _write_timing(scratch, folder)
        for old in names.difference(kept):
            (folder.path / old).unlink(missing_ok=True)
        write_atomic(folder.path / "merged.json", to_json({"generations": kept, "batches": batches}))
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"cannot write {error.filename or output}: {reason}. Every generation is safe in {folder.path}; "
            f"make room and run: batchgen merge {folder.path}"
        ) from error
    return output


def write_lines(path: Path, lines: Lines) -> None:
    """The lines as they stand: JSON lines."""
    with open(path, "xb", buffering=1 << 20) as file:
        file.writelines(line for _, line in lines())


def _write_timing(path: Path, folder: RunFolder) -> None:
    with open(path, "x", encoding="utf-8") as file:
        for _, record in folder.records(verify=True):  # a damaged batch was done again, and counts once
            file.write(json.dumps({name: getattr(record, name) for name in _TIMING}) + "\n")
