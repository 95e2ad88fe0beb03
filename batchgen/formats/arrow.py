"""Arrow IPC: the file kind (also Feather version 2) and the stream kind, told apart by their first bytes.

Both are read over a memory map, so that what is not compressed is not copied. Blocks are record batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.formats import Block, InputError, Scan, Source

if TYPE_CHECKING:
    import pyarrow as pa

_FILE_KIND = b"ARROW1"  # "File format" in Arrow's columnar format specification; a stream has no magic


class Arrow(Source):
    """One Arrow file; `line` is the row of the file, counted from 1."""

    suffixes = (".arrow", ".feather", ".ipc")

    def __init__(self, path: Path, name: str, cache: Path, number: int, scan: bool) -> None:
        self._lengths: list[int] = []  # rows of the record batches that have been seen
        super().__init__(path, name, cache, number, scan)

    def scan(self) -> Scan:
        """Reads all bytes for the digest, then every record batch."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        names = self.schema().names
        if len(set(names)) < len(names):
            raise InputError(f"{self.path} has two columns of the same name. Its columns: {', '.join(names)}")
        return Scan(digest, size, sum(block.rows for block in self.blocks()))

    def schema(self) -> pa.Schema:
        """The types of the columns."""
        with self._opened() as reader:
            return reader.schema

    def blocks(self) -> Iterator[Block]:
        """The record batches. Those of a stream are read one after the other; of the file kind, as they are wanted."""
        with self._opened() as reader:
            if not hasattr(reader, "get_batch"):
                yield from (Block(batch.num_rows, partial(iter, [batch])) for batch in reader)
                return
            for number in range(reader.num_record_batches):
                if number == len(self._lengths):
                    self._lengths.append(reader.get_batch(number).num_rows)
                yield Block(self._lengths[number], partial(map, reader.get_batch, [number]))

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        import pyarrow as pa

        try:
            with pa.memory_map(str(self.path)) as file:
                open_kind = pa.ipc.open_file if file.read(len(_FILE_KIND)) == _FILE_KIND else pa.ipc.open_stream
                file.seek(0)
                with open_kind(file) as reader:
                    yield reader
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.path} cannot be read as Arrow: {error}") from error
