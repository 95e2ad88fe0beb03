"""Parquet. Its blocks are row groups: those without a wanted row are not decoded, the others in small batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.batches import DAMAGE, check_names
from batchgen.formats import Block, InputError, Scan, Source

_END_AND_BEGINNING = b"PAR1" * 2
_BATCH = 1 << 22  # bytes of a row group, before compression, that are decoded at once, about


class Parquet(Source):
    """One Parquet file; `line` is the row of the file, counted from 1."""

    suffixes = (".parquet", ".pq")

    def scan(self) -> Scan:
        """Reads all bytes for the digest, and the footer."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        with self._opened() as parquet:
            check_names(parquet.schema_arrow)
            rows = parquet.metadata.num_rows
            if self._begins_again(parquet.metadata, size):
                raise InputError(
                    f"{self.path} is two Parquet files in one, of which only the last would be read. Name them as two"
                )
        return Scan(digest, size, rows)

    def _begins_again(self, metadata: pq.FileMetaData, size: int) -> bool:
        """Whether another file's end and beginning lie between the rows and the footer: `cat` has put them together."""
        ends = [0]
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            for column in map(group.column, range(group.num_columns)):
                begin = column.dictionary_page_offset or column.data_page_offset
                ends.append(begin + column.total_compressed_size)
        with self.path.open("rb") as file:
            file.seek(max(ends))
            behind = file.read(size - metadata.serialized_size - 8 - max(ends))  # indexes and Bloom filters, if any
        return _END_AND_BEGINNING in behind

    def schema(self) -> pa.Schema:
        """The types of the columns."""
        with self._opened() as parquet:
            return parquet.schema_arrow

    def blocks(self) -> Iterator[Block]:
        """The row groups."""
        with self._opened() as parquet:
            for number in range(parquet.num_row_groups):
                group = parquet.metadata.row_group(number)
                # A row group is often the whole file, so its rows come in batches of a size that fits into memory.
                rows = max(1, min(1024, _BATCH * group.num_rows // max(1, group.total_byte_size)))
                yield Block(group.num_rows, partial(parquet.iter_batches, rows, row_groups=[number], use_threads=False))

    @contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        try:
            # A buffer instead of pre-buffering: pages are read as they are decoded, not a row group beforehand.
            with pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as parquet:
                yield parquet
        except DAMAGE as error:
            raise InputError(f"{self.path} cannot be read as Parquet: {error}") from error
