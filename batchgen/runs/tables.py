"""Merged rows as Parquet or Arrow, with the types that the input's columns had.

Columns of a typed input (Parquet, Arrow, `datasets`) are taken from the input itself. Those of JSON lines are inferred
over all rows: whole numbers, numbers, booleans or text; whatever is nested or mixed becomes JSON text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.checkpoint import CheckpointError
from batchgen.formats.input import Input
from batchgen.requests.output import RESULT, WANTED, carried

Format = Literal["parquet", "arrow"]

Lines = Callable[[], Iterator[tuple[int, bytes]]]  # row number and JSON line of every row, in order

_ROWS = 8192  # of a row group or record batch …
_BYTES = 64 << 20  # … unless they hold more than this

_RESULT_TYPES: dict[str, pa.DataType] = {
    "id": pa.string(),
    "index": pa.int64(),
    "text": pa.string(),
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int64(),
    "generated_tokens": pa.int64(),
    "error": pa.struct([("type", pa.string()), ("message", pa.string()), ("line", pa.int64())]),
}
_FLOATS = pa.list_(pa.float64())
_IDS = pa.list_(pa.int64())
_TOKEN = pa.struct([("token", pa.int64()), ("text", pa.string()), ("logprob", pa.float64()), ("rank", pa.int64())])
_WANTED_TYPES: dict[str, pa.DataType] = {  # of columns that are there if a row of the run has asked for them
    "texts": pa.list_(pa.string()),
    "finish_reasons": pa.list_(pa.string()),
    "logprobs": _FLOATS,
    "texts_logprobs": pa.list_(_FLOATS),
    "top_logprobs": pa.list_(pa.list_(_TOKEN)),
    "prompt_logprobs": pa.list_(pa.list_(_TOKEN)),
    "token_ids": _IDS,
    "texts_token_ids": pa.list_(_IDS),
    "prompt_token_ids": _IDS,
    "stop_reason": pa.string(),  # a stop text, or the id of a stop token
    "reasoning": pa.string(),
    "tool_calls": pa.string(),  # JSON: a column of objects would give each of them the keys of all
    "texts_reasoning": pa.list_(pa.string()),
    "texts_tool_calls": pa.string(),
}
_ERROR_KEYS = {field.name for field in _RESULT_TYPES["error"]}


def write_table(path: Path, lines: Lines, format: Format, source: Input | None) -> None:
    """Writes the merged rows.

    Args:
        source: the input, if its columns have types and its rows are plain; None: infer from the lines.

    Raises:
        CheckpointError: the format has no place for a type of the input.
    """
    typed = None if source is None else source.schema()
    try:
        if source is None or typed is None:
            schema, tables = _inferred(lines)
        else:
            schema, tables = _typed(typed, lines, source, format)
        # By bytes, since the name of a folder need not be UTF-8.
        with pa.OSFile(os.fsencode(path), "wb") as file, _writer(file, schema, format) as write:
            for table in tables:
                write.write_table(table)
    except pa.ArrowException as error:
        raise CheckpointError(
            f"cannot write the generations as {format}: {error}. Every one is safe in {path.parent}; "
            f"write them as JSON lines: batchgen merge --output-format jsonl {path.parent}"
        ) from error


def _writer(file: pa.NativeFile, schema: pa.Schema, format: Format) -> Any:
    return pq.ParquetWriter(file, schema) if format == "parquet" else pa.ipc.new_file(file, schema)


def _typed(typed: pa.Schema, lines: Lines, source: Input, format: Format) -> tuple[pa.Schema, Iterator[pa.Table]]:
    own = [field for field in typed if field.name != "id"]
    names = carried(field.name for field in own)
    if format == "arrow":
        # A dictionary differs from block to block, and an Arrow file may hold but one for a column.
        own = [field.with_type(_without_dictionaries(field.type)) for field in own]
    kinds = dict(_RESULT_TYPES)
    wanted = _find_wanted(line for _, line in lines())
    kinds |= {name: _WANTED_TYPES[name] for name in WANTED if name in wanted}
    fields = [pa.field(name, kind) for name, kind in kinds.items()]
    merged = pa.schema(fields + [field.with_name(names[field.name]) for field in own])

    def batches() -> Iterator[pa.RecordBatch]:
        remaining = lines()
        ahead = next(remaining, None)
        begin = 0
        for batch in source.batches():
            rows: dict[int, dict[str, Any]] = {}
            while ahead is not None and ahead[0] < begin + batch.num_rows:
                rows[ahead[0] - begin] = _plain_row(ahead[1])
                ahead = next(remaining, None)
            # Not every type can be taken from, and nearly always all rows are there.
            kept = batch if len(rows) == batch.num_rows else batch.take(pa.array(list(rows), pa.int64()))
            results = [
                pa.array([_fitted(row.get(name), kind) for row in rows.values()], kind) for name, kind in kinds.items()
            ]
            columns = [_as(kept.column(field.name), field.type) for field in own]
            if rows:
                yield pa.RecordBatch.from_arrays([*results, *columns], schema=merged)
            begin += batch.num_rows

    tables = (pa.Table.from_batches(group) for group in _grouped(batches(), len, lambda batch: int(batch.nbytes)))
    return merged, tables if format == "parquet" else (table.combine_chunks() for table in tables)


def _plain_row(line: bytes) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(line)
    if "index" not in row:
        raise pa.ArrowInvalid(f"{row.get('custom_id')} is an answer to an OpenAI request among plain rows")
    return row


def _find_wanted(lines: Iterable[bytes]) -> set[str]:
    """Names of `WANTED` that a row has."""
    # Nearly all lines end the question without being parsed: within a text, the quotes are escaped.
    marks = {name: f'"{name}":'.encode() for name in WANTED}
    found: set[str] = set()
    for line in lines:
        if names := [name for name, mark in marks.items() if name not in found and mark in line]:
            row = json.loads(line)
            found.update(name for name in names if _fits(name, _kind(row.get(name))))
    return found


def _fits(name: str, kind: str) -> bool:
    """Whether a value of this kind is what batchgen itself writes under this name of `WANTED`."""
    if name in ("stop_reason", "reasoning"):
        return kind == "text" or (kind == "int" and name == "stop_reason")
    return kind in ("floats", "list")


def _as(column: pa.Array, kind: pa.DataType) -> pa.Array:
    return column if column.type == kind else column.cast(kind)


def _without_dictionaries(kind: pa.DataType) -> pa.DataType:
    """`kind` with every dictionary type in it replaced by that of its values."""
    if pa.types.is_dictionary(kind):
        return _without_dictionaries(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_dictionaries(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_without_dictionaries(kind.value_type)))
    return kind


def _grouped(
    parts: Iterable[Any], rows_of: Callable[[Any], int], bytes_of: Callable[[Any], int]
) -> Iterator[list[Any]]:
    """`parts` in groups of about `_ROWS` rows, or `_BYTES`."""
    group: list[Any] = []
    rows = size = 0
    for part in parts:
        group.append(part)
        rows, size = rows + rows_of(part), size + bytes_of(part)
        if rows >= _ROWS or size >= _BYTES:
            yield group
            group, rows, size = [], 0, 0
    if group:
        yield group


def _inferred(lines: Lines) -> tuple[pa.Schema, Iterator[pa.Table]]:
    kinds: dict[str, set[str]] = {}
    for _, line in lines():
        for name, value in json.loads(line).items():
            kinds.setdefault(name, set()).add(_kind(value))
    types = {name: _RESULT_TYPES.get(name) or _type(seen - {"null"}) for name, seen in kinds.items()}
    if "error" in types and ("index" not in types or not kinds["error"] <= {"error", "null"}):
        types["error"] = pa.string()  # that of an OpenAI answer is another one
    wanted = [name for name in WANTED if "index" in types and _all_fit(name, kinds.get(name, set()) - {"null"})]
    types |= {name: _WANTED_TYPES[name] for name in wanted}
    if "index" in types:
        types = {name: types[name] for name in (*RESULT, *wanted)} | types  # the first row may not have asked
    types = types or _RESULT_TYPES
    schema = pa.schema([pa.field(name, kind) for name, kind in types.items()])

    def tables() -> Iterator[pa.Table]:
        for group in _grouped((line for _, line in lines()), lambda line: 1, len):
            rows = [json.loads(line) for line in group]
            columns = [[_fitted(row.get(name), kind) for row in rows] for name, kind in types.items()]
            arrays = [pa.array(column, kind) for column, kind in zip(columns, types.values(), strict=True)]
            yield pa.Table.from_arrays(arrays, schema=schema)

    return schema, tables()


def _all_fit(name: str, kinds: set[str]) -> bool:
    return bool(kinds) and all(_fits(name, kind) for kind in kinds)


_INT64 = range(-(1 << 63), 1 << 63)
_EXACT = range(-(1 << 53), (1 << 53) + 1)  # whole numbers that a float64 can hold, every one of them


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if value in _EXACT else "long" if value in _INT64 else "json"
    if isinstance(value, float):
        return "float"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and all(part is None or type(part) is float for part in value):
        return "floats"
    if isinstance(value, list):
        return "list"
    return "error" if isinstance(value, dict) and value.keys() == _ERROR_KEYS else "json"


def _type(kinds: set[str]) -> pa.DataType:
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds and kinds <= {"int", "long"}:
        return pa.int64()
    if kinds and kinds <= {"int", "float"}:
        return pa.float64()
    return pa.string()


def _fitted(value: Any, kind: pa.DataType) -> Any:
    """`value` for a column of type `kind`; JSON text where a column of text has something else."""
    if kind == pa.string() and value is not None and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return float(value) if kind == pa.float64() and value is not None else value
