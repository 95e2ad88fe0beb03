"""Input files as rows.

Each other module here is one input format: one concrete class that derives from `Source`, found by its file name. One
process scans a file and leaves what it found in a cache folder; the others take that. What a run began with is said by
the run itself and never by the cache. Rows are read when asked for: a file may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from batchgen.files import write_atomic
from batchgen.formats._originals import Changed, InputError, Original
from batchgen.types import RowError

if TYPE_CHECKING:  # its import takes a quarter of a second, which JSONL does without
    import pyarrow as pa

__all__ = ["Block", "Changed", "InputError", "Original", "Scan", "Source", "Value", "blocks_of", "place_of"]

Value = Mapping[str, object] | RowError  # the columns of one row, or why they could not be read

_PIECE_ROWS, _PIECE_BYTES = 1024, 1 << 22  # roughly the most of a typed file that becomes Python objects at once


class Scan(NamedTuple):
    """What reading a whole file once has shown."""

    digest: str  # SHA-256 of the bytes, hex
    size: int  # bytes of what rows are read from: the file, its unpacked text, or the files of a folder
    rows: int


class Block(NamedTuple):
    """Rows of a typed file that are stored together: a row group, a record batch."""

    rows: int
    read: Callable[[], Iterable[pa.RecordBatch]]  # may raise what pyarrow raises


class Source(ABC):
    """One input file, or one folder that counts as a file.

    A format gives `suffixes`, `scan`, and either `schema` and `blocks` (typed columns) or a `rows` of its own.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()  # file name endings, in lower case, with the dot
    has_every_key: ClassVar[bool] = True  # typed columns: an object that lacks a key is read with null in its place

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether `path`, which exists, is of this format by its name."""
        return path.is_file() and path.name.lower().endswith(cls.suffixes)

    def __init__(
        self, path: Path, name: str, cache: Path, number: int, into: Path | None, original: Original | None = None
    ) -> None:
        """Opens the `number`-th file of the input, counted from 0; rows call it `name`, or as the run began with it.

        A row without an id is named, and sampled, by its file and line: of both, nothing may change with a new name.

        Args:
            cache: where an accepted start has left what its scan found.
            into: the whole file is scanned, and what that finds is left in this folder; None: the cache is taken.
            original: what a run has begun with in this place; None: none has.

        Raises:
            InputError: it cannot be read, is not what its name says, was not scanned, or has changed (`Changed`) since.
        """
        self.path, self.name, self._original = path, name, original
        self.rows_before: int | None = None  # of a file to which rows were appended since the run began; else None
        self._cursor: tuple[Generator[tuple[int, pa.RecordBatch], int | None, None], int, pa.RecordBatch] | None = None
        self.kept = cache / f"{number:05d}"  # where the run keeps it; each file of a format has an ending of its own
        self.cache = self.kept if into is None else into / self.kept.name  # what is read now
        try:
            self._stamps = self._stamp()  # before the scan: what changes meanwhile shows too
            if into is not None:
                into.mkdir(parents=True, exist_ok=True)
                self._scan(into)
                return
            recorded = self._record.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read or write {error.filename or path}: {error.strerror or error}") from error
        try:
            recorded_name, *values, self.name = json.loads(recorded)
            self.scanned = Scan(*values)
        except (ValueError, TypeError) as error:
            raise InputError(f"{self._record} is damaged. Delete it and start again") from error
        if recorded_name != name:
            raise InputError(
                f"file {number + 1} of the input is {name} now, but was {recorded_name} when the run started"
            )
        self._size = self.scanned.size
        self.check_unchanged()

    def _scan(self, into: Path) -> None:
        name, self.scanned = self.name, self.scan()
        self._size = self.scanned.size
        if self._original is not None:
            self._original = original = self._original.completed(*self._read_cached()[:3])
            if original.digest not in ("", self.scanned.digest):
                self.rows_before = self.check_grown(original)
            self.name = original.name if original.digest else self._read_cached_name() or original.name
        record = into / self._record.name
        write_atomic(record, json.dumps([name, *self.scanned, self.name]).encode(), durable=False)

    @property
    def _record(self) -> Path:
        return self.kept.with_suffix(".json")

    def check_grown(self, original: Original) -> int:
        """The number of rows that the file had as `original`, which it differs from: rows have been appended, only.

        Raises:
            Changed: another thing has changed.
        """
        where = ""
        if original.rows is not None and original.rows < len(self):
            where = f", {len(self)} rows where it had {original.rows}. New rows of a table go into a file of their own"
        raise Changed(self.path, where)

    @property
    def began_with(self) -> tuple[str, int]:
        """Digest and number of rows of the file before rows were appended to it."""
        if self._original is None or self.rows_before is None:
            return self.scanned.digest, len(self)
        return self._original.digest, self.rows_before

    @property
    def original(self) -> Original:
        """The file, as a run that begins or goes on with it records it."""
        return Original(self.name, self.scanned.digest, self.scanned.rows, self.scanned.size, self.text_digest)

    @property
    def text_digest(self) -> str:
        """SHA-256 of the unpacked text, hex; "" where rows are read from the file itself."""
        return ""

    def _read_cached(self) -> tuple[str, int, int, str]:
        """What an earlier start has kept of this file: digest, bytes, rows, and the name that its rows call it."""
        try:
            name, digest, size, rows, *first = json.loads(self._record.read_bytes())
        except (FileNotFoundError, ValueError, TypeError):
            return "", 0, 0, ""
        return str(digest), size, rows, str(first[0] if first else name)  # at first, four values were kept

    def _read_cached_name(self) -> str | None:
        """The name under which an earlier start read a file with the same content; None: the cache does not say."""
        digest, *_, name = self._read_cached()
        return name if digest == self.scanned.digest else None

    def settle(self) -> None:
        """The result of the scan has been moved into the cache of the run; from now on it is read there."""
        self.cache = self.kept

    def __len__(self) -> int:
        return self.scanned.rows

    def bytes_of(self, number: int) -> int:
        """About how many bytes a row takes."""
        return self.scanned.size // self.scanned.rows

    def files(self) -> list[Path]:
        """What rows are read from, in order."""
        return [self.path]

    @property
    def unpacked(self) -> bool:
        """Whether `files` are batchgen's own, made from the input, and nobody else's to change."""
        return False

    @property
    def grows(self) -> bool:
        """Whether rows can be appended while a start reads it: it stays as it was up to there."""
        return False

    def digest(self) -> str:
        """The digest of the scan, made again, of what the scan has read. May raise OSError besides InputError."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def check_unchanged(self) -> None:
        """Raises InputError if the content is not that of the scan: rows read then would be garbage, or of two files.

        Looks at the size; and at the content, if a file was replaced or written to since it was opened here. Rows that
        are appended to it meanwhile are none of this start's.
        """
        try:
            size, stamps = sum(file.stat().st_size for file in self.files()), self._stamp()
            same = (size, stamps) == (self._size, self._stamps)
            if not same and (size == self.scanned.size or (self.grows and size > self.scanned.size)):
                same = self.digest() == self.scanned.digest
        except OSError as error:
            raise InputError(f"cannot open {error.filename}: {error.strerror}") from error
        if not same:
            was = f"it had {self.scanned.size} bytes when the run started and has {size} now"
            if size == self.scanned.size:
                was = "it is as long as when the run started, but holds something else"
            raise InputError(f"{self.path} has changed: {was}. Put it back as it was, or start a new run")
        self._size, self._stamps = size, stamps

    def _stamp(self) -> list[tuple[int, int]]:
        stats = [] if self.unpacked else [file.stat() for file in self.files()]
        return [(stat.st_ino, stat.st_mtime_ns) for stat in stats]

    @abstractmethod
    def scan(self) -> Scan:
        """Reads the whole file once. May raise OSError besides InputError."""

    def schema(self) -> pa.Schema | None:
        """The types of the columns; None for a format that has none."""
        return None

    def blocks(self) -> Iterator[Block]:
        """The blocks of a typed file in order. A block is read, if at all, before the next one is asked for."""
        raise NotImplementedError(f"{type(self).__name__} has no typed columns")

    def rows(self, numbers: Iterable[int]) -> Iterator[tuple[int, int, Value]]:
        """Number (in this file, from 0), line (from 1) and value of each row of `numbers`, which must ascend.

        A bad row is a value, no exception. Reads forward, a little ahead; the next call goes on where this one ended.

        Raises:
            InputError: the file cannot be read any further.
        """
        from batchgen.formats._record_batches import values

        self.check_unchanged()
        wanted = iter(numbers)
        number = next(wanted, None)
        while number is not None:
            cursor, self._cursor = self._cursor, None  # none is left behind by an error
            if cursor is None or number < cursor[1]:
                cursor = (pieces := self.pieces(), *next(pieces))
            pieces, begin, batch = cursor
            while number >= begin + batch.num_rows:
                begin, batch = pieces.send(number)
            self._cursor = pieces, begin, batch
            picked = []
            while number is not None and number < begin + batch.num_rows:
                picked.append(number - begin)
                number = next(wanted, None)
            for row, value in values(batch, picked, begin, self.name):
                yield begin + row, begin + row + 1, value

    def hashes(self, id_of: Callable[[Value], str | None], prefix: str) -> Iterator[int]:
        """A number for each row, the same for rows of one id, with `prefix` in front; a row without an id is called
        `place_of` its line."""
        for _, line, value in self.rows(range(len(self))):
            own = id_of(value)
            yield hash((prefix + own if prefix else own) if own else place_of(self.name, line))

    def pieces(self) -> Generator[tuple[int, pa.RecordBatch], int | None, None]:
        """The rows of a typed file in order, few at a time, after the number of their first.

        If the number of a row is sent to the generator, it skips the blocks before that row. Raises InputError.
        """
        import pyarrow as pa

        from batchgen.formats._record_batches import DAMAGE

        begin, wanted = 0, 0
        for block in self.blocks():
            first, end = begin, begin + block.rows
            read = wanted < end
            try:
                for batch in block.read() if read else ():
                    batch.validate()  # that what it says of itself is there; the values are for `readable`
                    if begin + batch.num_rows > end:
                        raise pa.ArrowInvalid(f"there are more than the {block.rows} rows it says it has")
                    rows = min(_PIECE_ROWS, 1 + _PIECE_BYTES * batch.num_rows // (1 + batch.get_total_buffer_size()))
                    for row in range(0, batch.num_rows, rows):
                        wanted = (yield begin + row, batch.slice(row, rows)) or 0
                    begin += batch.num_rows
                if read and begin < end:
                    raise pa.ArrowInvalid(f"there are fewer than the {block.rows} rows it says it has")
            except DAMAGE as error:
                where = f"rows {first + 1} to {end}"
                raise InputError(f"{self.path} is damaged: {where} cannot be read ({error})") from error
            begin = end


def blocks_of(stream: Iterable[pa.RecordBatch]) -> Iterator[Block]:
    """The record batches of an Arrow stream, which are read one after the other. Raises what pyarrow raises."""
    for batch in stream:
        batch.validate()  # its number of rows may be any
        yield Block(batch.num_rows, partial(iter, [batch]))


def place_of(name: str, line: int) -> str:
    """The id of a row that has none of its own."""
    return f"{name}:{line}"
