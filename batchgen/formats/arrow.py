"""Arrow IPC: the file kind (also Feather version 2) and the stream kind, told apart by their first bytes.

Both are read over a memory map, so that what is not compressed is not copied. Blocks are record batches.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchgen.formats import Block, InputError, Original, Scan, Source, blocks_of
from batchgen.formats._record_batches import DAMAGE, check_names, check_stream_ends, find_bytes

_FILE_KIND = b"ARROW1"  # "File format" in Arrow's columnar format specification; a stream has no magic

_END_AND_BEGINNING = _FILE_KIND * 2 + bytes(2)  # where one file ends and another begins, with its padding

_KINDS = {True: pa.ipc.open_file, False: pa.ipc.open_stream}


class Arrow(Source):
    """One Arrow file; `line` is the row of the file, counted from 1."""

    suffixes = (".arrow", ".feather", ".ipc")

    def __init__(
        self, path: Path, name: str, cache: Path, number: int, into: Path | None, original: Original | None = None
    ) -> None:
        self._lengths: list[int] = []  # rows of the record batches that have been seen
        super().__init__(path, name, cache, number, into, original)

    def scan(self) -> Scan:
        """Reads all bytes for the digest, then every record batch."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        with self._open_table() as reader:
            check_names(reader.schema)
        rows = sum(block.rows for block in self.blocks())
        self._check_whole()
        return Scan(digest, size, rows)

    def _check_whole(self) -> None:
        """Raises InputError if the file was cut off between two record batches, or `cat` has put two files together."""
        with self._mapped() as (file, is_file_kind):
            if not is_file_kind:
                check_stream_ends(file)
                return
        if find_bytes(self.path, _END_AND_BEGINNING) >= 0:
            raise InputError(f"{self.path} is two Arrow files in one, of which one would not be read. Make two of it")

    def schema(self) -> pa.Schema:
        """The types of the columns."""
        with self._open_table() as reader:
            return reader.schema

    def blocks(self) -> Iterator[Block]:
        """The record batches. Those of a stream are read one after the other; of the file kind, as they are wanted."""
        with self._open_table() as reader:
            if not hasattr(reader, "get_batch"):
                yield from blocks_of(reader)
                return
            for number in range(reader.num_record_batches):
                if number == len(self._lengths):
                    batch = reader.get_batch(number)
                    batch.validate()
                    self._lengths.append(batch.num_rows)
                yield Block(self._lengths[number], partial(map, reader.get_batch, [number]))

    @contextmanager
    def _open_table(self) -> Iterator[Any]:
        with self._mapped() as (file, is_file_kind), _KINDS[is_file_kind](file) as reader:
            yield reader

    @contextmanager
    def _mapped(self) -> Iterator[tuple[pa.NativeFile, bool]]:
        """The bytes, and whether they are of the file kind."""
        try:
            with pa.memory_map(os.fsencode(self.path)) as file:
                is_file_kind = file.read(len(_FILE_KIND)) == _FILE_KIND
                file.seek(0)
                yield file, is_file_kind
        except DAMAGE as error:
            raise InputError(f"{self.path} cannot be read as Arrow: {error}") from error
