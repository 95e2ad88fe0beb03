"""Merged rows as Parquet or Arrow, with the types that the input's columns had.

Columns of a typed input (Parquet, Arrow, `datasets`) are taken from the input itself. Those of JSON lines are inferred
over all rows: whole numbers, numbers, booleans or text; whatever is nested or mixed becomes JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.formats import Input
from batchgen.output import RESULT

Format = Literal["parquet", "arrow"]

Lines = Callable[[], Iterator[tuple[int, bytes]]]  # row number and JSON line of every row, in order

_ROWS = 8192  # of a row group or record batch

_RESULT_TYPES: dict[str, pa.DataType] = {
    "id": pa.string(),
    "index": pa.int64(),
    "text": pa.string(),
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int64(),
    "generated_tokens": pa.int64(),
    "error": pa.struct([("type", pa.string()), ("message", pa.string()), ("line", pa.int64())]),
}


def write_table(path: Path, lines: Lines, format: Format, source: Input | None) -> None:
    """Writes the merged rows.

    Args:
        source: the input, if its columns have types and its rows are plain; None: infer from the lines.
    """
    schema = None if source is None else source.schema()
    if source is None or schema is None:
        schema, blocks = _inferred(lines)
    else:
        schema, blocks = _typed(schema, lines, source)
    with _writer(path, schema, format) as write:
        for block in blocks:
            write.write_batch(block)


def _writer(path: Path, schema: pa.Schema, format: Format) -> Any:
    return pq.ParquetWriter(path, schema) if format == "parquet" else pa.ipc.new_file(path, schema)


def _typed(schema: pa.Schema, lines: Lines, source: Input) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    own = [field for field in schema if field.name != "id"]
    fields = [pa.field(name, kind) for name, kind in _RESULT_TYPES.items()]
    fields += [field.with_name(f"input_{field.name}") if field.name in RESULT else field for field in own]
    merged = pa.schema(fields)

    def blocks() -> Iterator[pa.RecordBatch]:
        found = lines()
        ahead = next(found, None)
        begin = 0
        for batch in source.batches():
            rows: dict[int, dict[str, Any]] = {}
            while ahead is not None and ahead[0] < begin + batch.num_rows:
                rows[ahead[0] - begin] = json.loads(ahead[1])
                ahead = next(found, None)
            kept = batch.take(pa.array(list(rows), pa.int64()))
            results = [pa.array([row.get(name) for row in rows.values()], kind) for name, kind in _RESULT_TYPES.items()]
            yield pa.RecordBatch.from_arrays([*results, *(kept.column(field.name) for field in own)], schema=merged)
            begin += batch.num_rows

    return merged, blocks()


def _inferred(lines: Lines) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    kinds: dict[str, set[str]] = {}
    for _, line in lines():
        for name, value in json.loads(line).items():
            kinds.setdefault(name, set()).add(_kind(value))
    types = {name: _RESULT_TYPES.get(name) or _type(found - {"null"}) for name, found in kinds.items()}
    if "response" in types and "index" not in types:  # OpenAI's answers: their `error` is another one
        types["error"] = pa.string()
    types = types or _RESULT_TYPES
    schema = pa.schema([pa.field(name, kind) for name, kind in types.items()])

    def blocks() -> Iterator[pa.RecordBatch]:
        rows = (json.loads(line) for _, line in lines())
        while block := list(islice(rows, _ROWS)):
            columns = [[_fitted(row.get(name), kind) for row in block] for name, kind in types.items()]
            arrays = [pa.array(column, kind) for column, kind in zip(columns, types.values(), strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)

    return schema, blocks()


_INT64 = range(-(1 << 63), 1 << 63)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if value in _INT64 else "json"
    if isinstance(value, float):
        return "float"
    return "text" if isinstance(value, str) else "json"


def _type(kinds: set[str]) -> pa.DataType:
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds == {"int"}:
        return pa.int64()
    if kinds in ({"float"}, {"int", "float"}):
        return pa.float64()
    return pa.string()


def _fitted(value: Any, kind: pa.DataType) -> Any:
    """`value` for a column of type `kind`; JSON text where a column of text has something else."""
    if kind == pa.string() and value is not None and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return float(value) if kind == pa.float64() and value is not None else value
