"""Parquet. Its blocks are row groups: those without a wanted row are not decoded, the others in small batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from batchgen.formats import Block, InputError, Scan, Source

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

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
            names = parquet.schema_arrow.names
            rows = parquet.metadata.num_rows
        if len(set(names)) < len(names):
            raise InputError(f"{self.path} has two columns of the same name. Its columns: {', '.join(names)}")
        return Scan(digest, size, rows)

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
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # A buffer instead of pre-buffering: pages are read as they are decoded, not a row group beforehand.
            with pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as parquet:
                yield parquet
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.path} cannot be read as Parquet: {error}") from error
