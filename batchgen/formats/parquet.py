"""Parquet. Its blocks are row groups: those without a wanted row are not decoded, the others in small batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.formats import Block, InputError, Scan, Source
from batchgen.formats._record_batches import DAMAGE, check_names, find_bytes

_MAGIC = b"PAR1"  # at the beginning and the end of a file
_END_AND_BEGINNING = _MAGIC * 2
_BATCH = 1 << 22  # bytes of a row group, before compression, that are decoded at once, about


class Parquet(Source):
    """One Parquet file; `line` is the row of the file, counted from 1."""

    suffixes = (".parquet", ".pq")

    def scan(self) -> Scan:
        """Reads all bytes for the digest, and the footer."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        with self._open_table() as parquet:
            check_names(parquet.schema_arrow)
            rows = parquet.metadata.num_rows
            self._check_alone()
        return Scan(digest, size, rows)

    def _check_alone(self) -> None:
        """Raises InputError if `cat` has put two files together: readers see the last footer and not what is before."""
        end = find_bytes(self.path, _END_AND_BEGINNING)
        if end < 0:
            return
        with pa.memory_map(os.fsencode(self.path)) as file:
            first = file.read_buffer(end + len(_MAGIC))
        try:
            pq.read_metadata(pa.BufferReader(first))
        except DAMAGE:
            return  # it is in a text
        raise InputError(f"{self.path} is two Parquet files in one, of which one would not be read. Make two of it")

    def schema(self) -> pa.Schema:
        """The types of the columns."""
        with self._open_table() as parquet:
            return parquet.schema_arrow

    def blocks(self) -> Iterator[Block]:
        """The row groups."""
        with self._open_table() as parquet:
            for number in range(parquet.num_row_groups):
                group = parquet.metadata.row_group(number)
                # A row group is often the whole file, so its rows come in batches of a size that fits into memory.
                rows = max(1, min(1024, _BATCH * group.num_rows // max(1, group.total_byte_size)))
                yield Block(group.num_rows, partial(parquet.iter_batches, rows, row_groups=[number], use_threads=False))

    @contextmanager
    def _open_table(self) -> Iterator[pq.ParquetFile]:
        try:
            # A buffer instead of pre-buffering: pages are read as they are decoded, not a row group beforehand.
            # Opened by bytes, since a name need not be UTF-8.
            with (
                pa.OSFile(os.fsencode(self.path)) as file,
                pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as parquet,
            ):
                yield parquet
        except DAMAGE as error:
            raise InputError(f"{self.path} cannot be read as Parquet: {error}") from error
