"""JSON Lines, plain or compressed: one object a line, UTF-8.

The scan notes where each line begins (8 bytes a row, in memory and in the cache folder). A compressed file is unpacked
once, into the cache folder. A line that is no JSON object is an error row. Blank lines are no rows, but count as lines.
An object that has a key twice is no JSON object here: one of the two values would be lost.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from batchgen.files import replacing
from batchgen.formats import Changed, InputError, Original, Scan, Source, Value, place_of
from batchgen.formats._json_files import other_kind
from batchgen.formats._json_lines import BOM, DECODER, DEEPEST, read_carefully, writable
from batchgen.formats._originals import RowChecksums, begins_with_lines, digest_of_beginning, find_difference
from batchgen.formats._unpacking import WINDOW, open_unpacked, packed

_ESCAPED_NAME = re.compile(rb"\\u00[567]")  # letters that only a name like "\u0069d" needs to escape
_ID_FIRST = re.compile(rb'^[ \t]*\{[ \t]*"(?:custom_)?id"[ \t]*:[ \t]*"([^"\\\n]+)"', re.MULTILINE)


class Jsonl(Source):
    """One file of JSON lines."""

    suffixes = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst")
    has_every_key = False

    def __init__(
        self, path: Path, name: str, cache: Path, number: int, into: Path | None, original: Original | None = None
    ) -> None:
        self._begins: array[int] = array("Q")  # the byte where each row begins; then one past the newline of the last
        self._blanks: array[int] = array("Q")  # for each blank line, how many rows stand above it
        self._expected: list[int] = []  # what `_checksum` shall be
        self._sums: array[int] = array("I")  # CRC-32 of each row, until they are saved
        self._text_digest = ""
        # A start before has unpacked it, and reads on whatever has become of the file.
        self._is_packed = (cache / f"{number:05d}.jsonl").exists() if into is None else packed(path) is not None
        super().__init__(path, name, cache, number, into, original)
        if into is None and self._load() != self.scanned:
            raise InputError(f"{self._index} is not the index of {path}, or damaged. Delete it and start again")

    @property
    def unpacked(self) -> bool:
        """Whether it is compressed."""
        return self._is_packed

    @property
    def grows(self) -> bool:
        """Whether it is lines as they stand, behind which others can be written."""
        return not self.unpacked

    @property
    def text_digest(self) -> str:
        """Known after a scan."""
        return self._text_digest

    @property
    def _text(self) -> Path:
        return self.cache.with_suffix(".jsonl") if self.unpacked else self.path

    @property
    def _index(self) -> Path:
        return self.cache.with_suffix(".offsets")

    @property
    def _checksums(self) -> Path:
        return self.cache.with_suffix(".rows")

    def bytes_of(self, number: int) -> int:
        """What the row's line takes."""
        return self._begins[number + 1] - self._begins[number]

    def files(self) -> list[Path]:
        """The file, or its unpacked text."""
        return [self._text]

    def digest(self) -> str:
        """That of the file as far as the scan has read it."""
        with self.path.open("rb") as file:
            return digest_of_beginning(file, self.scanned.size)

    def check_grown(self, original: Original) -> int:
        """Compares the text that the file had with the beginning of its text now."""
        size, rows = original.size, original.rows
        digest = original.text_digest or original.digest  # of a packed file without the former, nothing has that
        if size is not None and rows is not None and size <= self.scanned.size:
            with self._text.open("rb") as file:
                if begins_with_lines(file, size, digest):
                    return rows
        before, now = RowChecksums.load(self.kept.with_suffix(".rows")), RowChecksums.load(self._checksums)
        first = None
        if before is not None and now is not None and before.digest == original.digest:
            first = find_difference(before.rows, now.rows)
        if first is None:
            raise Changed(self.path)
        if first == len(self):
            raise Changed(self.path, f", only the first {first} of its rows")
        raise Changed(self.path, f", first in line {first + 1 + bisect_right(self._blanks, first)}")

    def scan(self) -> Scan:
        """Notes where the rows begin; unpacks the file, unless an earlier start has."""
        if self.unpacked:
            return self._unpack()
        sha = hashlib.sha256()
        with io.BufferedReader(io.FileIO(self.path), WINDOW) as lines:
            size = self._note(lines.peek(WINDOW), _passed(lines, sha.update))
        return self._save(sha.hexdigest(), size, "")

    def _unpack(self) -> Scan:
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        fresh, self.cache = self.cache, self.kept
        before, rows = self._load(), RowChecksums.load(self._checksums)
        if before and rows and before.digest == rows.digest == digest and self._checksum() == self._expected:
            self._text_digest = rows.text_digest
            return before
        self.cache = fresh
        try:
            with open_unpacked(self.path) as lines, _open_replacing(self._text) as text:
                sha = hashlib.sha256()
                passed = _passed(_passed(lines, text.write), sha.update)
                size = self._note(lines.peek(WINDOW), passed)
        except (EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                where = f"cannot unpack {self.path} into {self.kept.parent}"
                raise InputError(f"{where}: {error.strerror}. It needs room for the whole text") from error
            raise InputError(f"{self.path} cannot be unpacked: {error}. It is damaged, or was cut off") from error
        return self._save(digest, size, sha.hexdigest())

    def _note(self, head: bytes, lines: Iterable[bytes]) -> int:
        """Fills the index; gives the number of bytes of `lines`, which begin with `head`."""
        if (what := other_kind(head)) is not None:
            raise InputError(f"{self.path} is not JSON lines: {what}")
        self._begins, self._blanks = begins, blanks = array("Q"), array("Q")
        self._sums = sums = array("I")
        checksum = zlib.crc32
        position = 0
        line = b"\n"
        for line in lines:
            mark = 0
            if position == 0:
                mark = len(BOM) if line.startswith(BOM) else 0
            if line.isspace() or (mark and not line[mark:].strip()):
                blanks.append(len(begins))
            else:
                begins.append(position + mark)
                sums.append(checksum(line))
            position += len(line)
        if begins and begins[-1] >= position - len(line) and not line.endswith(b"\n"):
            sums[-1] = checksum(b"\n", sums[-1])  # it is the same row once its line has an end
        begins.append(position if line.endswith(b"\n") else position + 1)
        return position

    def _save(self, digest: str, size: int, text_digest: str) -> Scan:
        self._text_digest = text_digest
        RowChecksums(digest, text_digest, self._sums).save(self._checksums)
        self._sums = array("I")
        self._expected = self._checksum()
        with _open_replacing(self._index) as file:
            header = [digest, size, len(self._begins), len(self._blanks), self._expected]
            file.write(json.dumps(header).encode() + b"\n")
            self._begins.tofile(file)
            self._blanks.tofile(file)
        return Scan(digest, size, len(self._begins) - 1)

    def _load(self) -> Scan | None:
        """Fills the index from what `_save` wrote; None if that is not there or not whole."""
        self._begins, self._blanks = array("Q"), array("Q")
        try:
            with self._index.open("rb") as file:
                digest, size, begins, blanks, self._expected = json.loads(file.readline())
                self._begins.fromfile(file, begins)
                self._blanks.fromfile(file, blanks)
            return Scan(digest, size, begins - 1) if self._expected[0] == self._of_index() else None
        except (FileNotFoundError, ValueError, TypeError, EOFError, IndexError):
            return None

    def _of_index(self) -> int:
        return zlib.crc32(self._blanks, zlib.crc32(self._begins))

    def _checksum(self) -> list[int]:
        """CRC-32 of the index, and of the text that was unpacked: damage would be rows that nobody wrote."""
        checksum = 0
        with suppress(FileNotFoundError), self._text.open("rb", buffering=0) as text:
            while self.unpacked and (data := text.read(WINDOW)):
                checksum = zlib.crc32(data, checksum)
        return [self._of_index(), checksum]

    def rows(self, numbers: Iterable[int]) -> Iterator[tuple[int, int, Value]]:
        """Gives rows as `Source.rows` does, but in any order; it is quick where they ascend.

        Error rows are `malformed_json` or `wrong_type`.
        """
        self.check_unchanged()
        begins, blanks, decode = self._begins, self._blanks, DECODER.raw_decode
        with self._text.open("rb") as file:
            for window in self._windows(numbers):
                start = begins[window[0]]
                data = self._read(file, start, begins[window[-1] + 1])
                escapes = b"\\ud" in data or b"\\uD" in data
                for number in window:
                    line = number + 1 + (bisect_right(blanks, number) if blanks else 0)
                    raw = data[begins[number] - start : begins[number + 1] - start - 1]
                    value: Value
                    try:
                        text = raw.decode()
                        value, end = decode(text)
                    except (ValueError, RecursionError):
                        value = read_carefully(raw, line, self.name)
                    else:
                        if type(value) is not dict or (end != len(text) and text[end:].strip()):
                            value = read_carefully(raw, line, self.name)
                        elif escapes or (end > 2 * DEEPEST and text.count("[") + text.count("{") > DEEPEST):
                            value = writable(value, line, self.name)
                    yield number, line, value

    def hashes(self, id_of: Callable[[Value], str | None], prefix: str) -> Iterator[int]:
        """Gives hashes as `Source.hashes` does. A row that begins with its id is not parsed: its body can be long."""
        begins = self._begins
        with self._text.open("rb") as file:
            for window in self._windows(range(len(self))):
                start = begins[window[0]]
                data = self._read(file, start, begins[window[-1] + 1])
                ids = _ID_FIRST.findall(data)
                named = data.count(b'"id"') + data.count(b'"custom_id"')
                if len(ids) == len(window) == named and not _ESCAPED_NAME.search(data):
                    # Each row begins with its id and has no other: most files, and then nothing more is looked at.
                    yield from (hash(prefix + id.decode("utf-8", "replace")) for id in ids)
                    continue
                for _, line, value in self.rows(window):
                    own = id_of(value)
                    yield hash((prefix + own if prefix else own) if own else place_of(self.name, line))

    def _windows(self, numbers: Iterable[int]) -> Iterator[list[int]]:
        """`numbers` in groups whose text lies within `WINDOW` bytes, or alone."""
        begins = self._begins
        window: list[int] = []
        limit = 0
        for number in numbers:
            if begins[number + 1] > limit and window:
                yield window
                window = []
            if not window:
                limit = begins[number] + WINDOW
            window.append(number)
        if window:
            yield window

    def _read(self, file: IO[bytes], start: int, end: int) -> bytes:
        file.seek(start)
        size = self.scanned.size  # a last line without a newline ends one byte behind it
        data = file.read(min(end, size) - start)
        if len(data) != min(end, size) - start or (end <= size and not data.endswith(b"\n")):
            raise InputError(f"{self._text} has changed while it was read. Put it back as it was, or start a new run")
        return data


def is_blank(path: Path) -> bool:
    """Whether the file, unpacked, has nothing but blank lines.

    Raises:
        InputError: it cannot be read or unpacked.
    """
    try:
        with path.open("rb", buffering=WINDOW) if packed(path) is None else open_unpacked(path) as text:
            first = text.read(WINDOW).removeprefix(BOM)
            return not first.strip() and all(not part.strip() for part in iter(lambda: text.read(WINDOW), b""))
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(f"{path} cannot be read or unpacked: {error}") from error


def _passed(lines: Iterable[bytes], to: Callable[[bytes], object]) -> Iterator[bytes]:
    for line in lines:
        to(line)
        yield line


@contextmanager
def _open_replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once it is written to the end and on the disk; else nothing changes."""
    with replacing(path) as scratch, scratch.open("xb", buffering=WINDOW) as file:
        yield file
