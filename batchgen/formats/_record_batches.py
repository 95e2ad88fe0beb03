"""Record batches as rows, and what pyarrow does not check: it follows an offset that is damaged wherever it points.

A row that is damaged becomes an error row. What is wrong with a file as a whole is raised, without the file's name.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, groupby
from pathlib import Path

import pyarrow as pa

from batchgen.types import RowError

DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, RuntimeError, MemoryError, OverflowError, SystemError)
"""What pyarrow raises over damaged files."""

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # "IPC Streaming Format" in Arrow's specification


def check_names(schema: pa.Schema) -> None:
    """Raises ArrowInvalid if two columns have the same name, since a row is an object, or if a name is not UTF-8."""
    try:
        _check_utf8(schema)
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"the name of a column, or of a field in it, is not UTF-8: {error}") from error
    names: list[str] = schema.names
    if len(set(names)) < len(names):
        raise pa.ArrowInvalid(f"it has two columns of the same name. Its columns: {', '.join(names)}")


def _check_utf8(fields: Iterable[pa.Field]) -> None:
    for field in fields:
        field.name.isascii()  # pyarrow decodes it when it is asked for
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        _check_utf8(kind.field(number) for number in range(kind.num_fields))


def find_bytes(path: Path, what: bytes) -> int:
    """Where `what` begins in the file, which is not empty; -1: nowhere."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(what)


def check_stream_ends(file: pa.NativeFile) -> None:
    """Raises ArrowInvalid if an Arrow stream was cut off between two record batches, or if more stands behind its end.

    pyarrow takes both for the end, and rows would be missing without a word.
    """
    file.seek(0)
    mark = _END_OF_STREAM if file.read(4) == _END_OF_STREAM[:4] else bytes(4)  # as before Arrow 0.15
    file.seek(0)
    messages = pa.ipc.MessageReader.open_stream(file)
    with suppress(StopIteration):
        while True:
            messages.read_next_message()
    behind = file.size() - file.tell()
    file.seek(file.tell() - len(mark))
    if file.read(len(mark)) != mark:
        raise pa.ArrowInvalid("it ends without the mark of a stream's end: it was cut off, or is still being written")
    if behind:
        raise pa.ArrowInvalid(
            f"{behind} bytes stand behind the end of its stream and would not be read. If it is two streams put "
            "together, make two files of them"
        )


def readable(batch: pa.RecordBatch) -> pa.RecordBatch:
    """`batch` with nulls in the rows that are damaged, which would crash whoever looks at them."""
    if _is_sound(batch):
        return batch
    nothing = pa.RecordBatch.from_arrays([pa.nulls(1, field.type) for field in batch.schema], schema=batch.schema)
    rows = (batch.slice(row, 1) for row in range(batch.num_rows))
    table = pa.Table.from_batches([row if _is_sound(row) else nothing for row in rows], batch.schema)
    return table.combine_chunks().to_batches()[0]


def _is_sound(batch: pa.RecordBatch) -> bool:
    # Offsets that point outside, numbers of words that a dictionary does not have, text that is not UTF-8.
    try:
        batch.validate(full=True)
    except ValueError:
        return False
    return True


def values(
    batch: pa.RecordBatch, picked: Sequence[int], begin: int, name: str
) -> Iterator[tuple[int, dict[str, object] | RowError]]:
    """The rows `picked` of `batch`, which begins with row `begin` of the file `name`: row in the batch, and columns."""
    # Neighbours, which keep the same distance to their position, are converted together.
    for _, run in groupby(enumerate(picked), lambda pair: pair[1] - pair[0]):
        rows = [row for _, row in run]
        part = batch.slice(rows[0], len(rows))
        try:
            part.validate(full=True)  # pyarrow would follow an offset that is damaged wherever it points
            yield from zip(rows, part.to_pylist(), strict=True)
        except Exception as error:  # a date after 9999, no UTF-8, and whatever else there is
            if len(rows) > 1:
                yield from chain.from_iterable(values(batch, [row], begin, name) for row in rows)
            else:
                line = begin + rows[0] + 1
                why = " ".join(str(error).split()) or type(error).__name__
                message = f"row {line} of {name} has a value that cannot be read: {why}. Write this row again"
                yield rows[0], RowError("malformed_value", message, line)
