"""What a run has begun with: the files of its input as they were then, and where one of them differs now."""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from batchgen.files import replacing
from batchgen.types import UserError

_PIECE = 1 << 18  # bytes read at once


class InputError(UserError):
    """The input cannot be read: a sentence for the person at the terminal."""


class Changed(InputError):
    """The input does not hold what it held when the run began."""

    CAUSE = "is not what the run began with: it holds something else"

    def __init__(self, what: object, where: str = "") -> None:
        """`what` is the file, or the files; `where` goes on with the sentence, and says what differs."""
        super().__init__(f"{what} {self.CAUSE}{where}. Put it back as it was, or start a new run with another -o")
        self.what, self.where = what, where


class Original(NamedTuple):
    """A file of the input as the run has recorded it, when it began or when rows were appended to it.

    What an older version has not recorded is "" or None.
    """

    name: str  # what its rows call it
    digest: str  # SHA-256 of the bytes, hex
    rows: int | None = None
    size: int | None = None  # bytes of what rows are read from, as in `Scan`
    text_digest: str = ""  # SHA-256 of the unpacked text, hex; "" where rows are read from the file itself

    def completed(self, digest: str, size: int, rows: int) -> Original:
        """Itself, with what a scan of a file with that digest has found, if it is this one."""
        return self._replace(size=size, rows=rows) if self.rows is None and digest == self.digest else self


class RowChecksums(NamedTuple):
    """CRC-32 of each row of a file of lines, by which a later start says which row has changed first."""

    digest: str  # of the file
    text_digest: str  # as in `Original`
    rows: array[int]  # 4 bytes a row

    def save(self, path: Path) -> None:
        """Writes them to `path`. They need not outlive a power cut, after which they are made again."""
        with replacing(path, durable=False) as scratch, scratch.open("xb") as file:
            header = [self.digest, self.text_digest, len(self.rows), zlib.crc32(self.rows)]
            file.write(json.dumps(header).encode() + b"\n")
            self.rows.tofile(file)

    @classmethod
    def load(cls, path: Path) -> RowChecksums | None:
        """Those that `save` wrote; None if they are not there or not whole."""
        rows: array[int] = array("I")
        try:
            with path.open("rb") as file:
                digest, text_digest, count, checksum = json.loads(file.readline())
                rows.fromfile(file, count)
        except (OSError, ValueError, TypeError, EOFError):
            return None
        return cls(str(digest), str(text_digest), rows) if zlib.crc32(rows) == checksum else None


def find_difference(before: Sequence[int], now: Sequence[int]) -> int | None:
    """The number of the first row that differs or is gone; None: all of `before` are there."""
    different = (number for number, (one, other) in enumerate(zip(before, now, strict=False)) if one != other)
    return next(different, len(now) if len(now) < len(before) else None)


def digest_of_beginning(file: IO[bytes], size: int) -> str:
    """SHA-256 of the next `size` bytes, hex; the file then stands behind them."""
    sha = hashlib.sha256()
    while size > 0 and (data := file.read(min(size, _PIECE))):
        sha.update(data)
        size -= len(data)
    return sha.hexdigest()


def begins_with_lines(file: IO[bytes], size: int, digest: str) -> bool:
    """Whether the first `size` bytes have that SHA-256, and are whole lines.

    Where the last of them had no end, it may have been completed since: then it is another row.
    """
    if digest_of_beginning(file, size) != digest:
        return False
    file.seek(max(0, size - 1))
    return file.read(min(1, size)) in (b"", b"\n") or not file.readline().strip()
