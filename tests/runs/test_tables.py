"""Parquet and Arrow output: typed inputs keep their types, those of JSON lines are inferred."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.checkpoint import CheckpointError, merge_with
from batchgen.formats.input import Input
from batchgen.requests.output import RESULT, renderer
from batchgen.runs import tables
from batchgen.runs.tables import Format, Lines, write_table
from batchgen.types import Generation, RowError
from tests.checkpoint.folders import batch, commit, made

FORMATS: list[Format] = ["parquet", "arrow"]

render = renderer("m", 0, "openai", False)

REQUEST = {"custom_id": "r", "method": "POST", "url": "/v1/chat/completions", "body": {}}


def row(index: int, columns: dict[str, Any] | None = None, *, failed: bool = False) -> Generation:
    error = RowError("too_long", f"line {index + 1} is too long", index + 1) if failed else None
    reason = None if failed else "stop"
    return Generation(index, f"r{index}", None if failed else "é", reason, 3, 2, error, columns or {})


def lines_of(rows: Sequence[Generation]) -> Lines:
    return lambda: ((one.index, render(one)) for one in rows)


def read(path: Path, format: Format) -> pa.Table:
    if format == "parquet":
        return pq.ParquetFile(path).read()
    with pa.ipc.open_file(str(path)) as reader:
        return reader.read_all()


def written(path: Path, rows: Sequence[Generation], format: Format, source: Input | None = None) -> pa.Table:
    write_table(path / "out", lines_of(rows), format, source)
    return read(path / "out", format)


def inferred(path: Path, format: Format, columns: Sequence[dict[str, Any]]) -> pa.Table:
    return written(path, [row(index, one) for index, one in enumerate(columns)], format)


@pytest.mark.parametrize("format", FORMATS)
def test_the_result_has_these_types_and_failed_rows_stand_in_their_place(tmp_path: Path, format: Format) -> None:
    table = written(tmp_path, [row(0), row(1, failed=True)], format)
    assert table.schema.names == list(RESULT)
    assert [str(kind) for kind in table.schema.types[:-1]] == ["string", "int64", "string", "string", "int64", "int64"]
    assert table["error"].to_pylist() == [None, {"type": "too_long", "message": "line 2 is too long", "line": 2}]
    assert table["text"].to_pylist() == ["é", None]
    assert table["id"].to_pylist() == ["r0", "r1"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, 2], pa.int64(), [1, 2]),
        ([1, 2.5], pa.float64(), [1.0, 2.5]),
        ([2**63 - 1, -(2**63)], pa.int64(), [2**63 - 1, -(2**63)]),
        ([2**63, 1], pa.string(), [str(2**63), "1"]),
        ([2**53 + 1, 0.5], pa.string(), [str(2**53 + 1), "0.5"]),  # a float64 would lose the last digit
        ([True, False], pa.bool_(), [True, False]),
        ([True, 1], pa.string(), ["true", "1"]),
        (["a", "é"], pa.string(), ["a", "é"]),
        (["a", 1], pa.string(), ["a", "1"]),
        ([None, None], pa.string(), [None, None]),
        ([None, 3], pa.int64(), [None, 3]),
        ([{"a": ["é"]}, [1]], pa.string(), ['{"a": ["é"]}', "[1]"]),
        ([[], None], pa.string(), ["[]", None]),
    ],
)
def test_columns_of_json_lines(
    tmp_path: Path, format: Format, values: list[Any], kind: pa.DataType, expected: list[Any]
) -> None:
    table = inferred(tmp_path, format, [{"x": value} for value in values])
    assert table.schema.field("x").type == kind
    assert table["x"].to_pylist() == expected


@pytest.mark.parametrize("format", FORMATS)
def test_a_missing_key_is_null_and_odd_names_are_names(tmp_path: Path, format: Format) -> None:
    table = inferred(tmp_path, format, [{"x": 1, "": 2}, {"y": "b", "ü.ü": 0.5}])
    assert table.select(["x", "", "y", "ü.ü"]).to_pylist() == [
        {"x": 1, "": 2, "y": None, "ü.ü": None},
        {"x": None, "": None, "y": "b", "ü.ü": 0.5},
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_columns_of_json_lines_that_are_named_like_results(tmp_path: Path, format: Format) -> None:
    table = inferred(tmp_path, format, [{"text": 1, "input_text": 2, "error": "e"}])
    assert table.select(["input_input_text", "input_text", "input_error"]).to_pylist() == [
        {"input_input_text": 1, "input_text": 2, "input_error": "e"}
    ]
    assert table["text"].to_pylist() == ["é"]


@pytest.mark.parametrize("format", FORMATS)
def test_no_rows_have_the_columns_of_the_result(tmp_path: Path, format: Format) -> None:
    table = written(tmp_path, [], format)
    assert (table.num_rows, table.schema.names) == (0, list(RESULT))


@pytest.mark.parametrize("format", FORMATS)
def test_openai_answers_have_their_own_columns(tmp_path: Path, format: Format) -> None:
    good, bad = row(0), row(1, failed=True)
    good.request = bad.request = REQUEST
    table = written(tmp_path, [good, bad], format)
    assert table.schema.names == ["id", "custom_id", "response", "error"]
    assert set(table.schema.types) == {pa.string()}
    answers = [json.loads(text) for text in table["response"].to_pylist()]
    assert [answer["status_code"] for answer in answers] == [200, 400]
    assert answers[0]["body"]["choices"][0]["message"]["content"] == "é"


@pytest.mark.parametrize("format", FORMATS)
def test_errors_of_openai_answers_among_plain_rows_are_kept_whole(tmp_path: Path, format: Format) -> None:
    answer = row(1, failed=True)
    answer.request = REQUEST
    vllm = renderer("m", 0, "vllm", False)
    write_table(tmp_path / "out", lambda: ((one.index, vllm(one)) for one in [row(0), answer]), format, None)
    table = read(tmp_path / "out", format)
    assert table["index"].to_pylist() == [0, None]
    assert "is too long" in json.loads(table["error"][1].as_py())["error"]["message"]


@pytest.mark.parametrize("format", FORMATS)
def test_many_rows_are_written_in_groups(tmp_path: Path, format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_ROWS", 100)
    monkeypatch.setattr(tables, "_BYTES", 20_000)
    table = inferred(tmp_path, format, [{"n": n, "long": "x" * (n // 500 * 1000)} for n in range(1000)])
    assert table["n"].to_pylist() == list(range(1000))
    if format == "parquet":
        metadata = pq.read_metadata(tmp_path / "out")
        groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        assert groups[:5] == [100] * 5
        assert max(groups[5:]) < 20


def typed_table(values: list[str], start: int) -> pa.Table:
    count = len(values)
    words = pa.array(values).dictionary_encode()
    return pa.table(
        {
            "id": pa.array(range(start, start + count), pa.int32()),
            "prompt": pa.array(values, pa.large_string()),
            "when": pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5, 6)] * count, pa.timestamp("us", "+02:00")),
            "price": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal(-7)][:count], pa.decimal128(9, 2)),
            "raw": pa.array([b"\xff\x00"] * count),
            "sizes": pa.array([[1, None]] * count, pa.list_(pa.int16())),
            "place": pa.array([{"x": 1.5, "y": None}] * count, pa.struct([("x", pa.float32()), ("y", pa.date32())])),
            "none": pa.nulls(count),
            "word": words,
            "in_struct": pa.StructArray.from_arrays([words], ["word"]),
            "in_list": pa.ListArray.from_arrays(pa.array(range(count + 1), pa.int32()), words),
            "text": pa.array(range(count), pa.int8()),
            "input_text": pa.array([True] * count),
        }
    )


PARTS = [typed_table(["a", "b"], 0), typed_table(["b", "c", "a"], 2), typed_table(["d"], 5)]


def _as_arrow_stream(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, PARTS[0].schema) as write:
        for part in PARTS:
            write.write_table(part)


def _as_parquet(path: Path) -> None:
    with pq.ParquetWriter(path, PARTS[0].schema) as write:
        for part in PARTS:
            write.write_table(part)


SOURCES: dict[str, Callable[[Path], None]] = {"in.arrow": _as_arrow_stream, "in.parquet": _as_parquet}


def source(path: Path, name: str) -> Input:
    SOURCES[name](path / name)
    return Input.open([str(path / name)], path / "cache", scan=True)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", SOURCES)
def test_typed_columns_keep_types_and_values(tmp_path: Path, format: Format, name: str) -> None:
    given = pa.concat_tables(PARTS)
    rows = [row(index, failed=index == 3) for index in range(6)]
    table = written(tmp_path, rows, format, source(tmp_path, name))
    assert table.schema.names[: len(RESULT)] == list(RESULT)
    assert table["id"].to_pylist() == [f"r{index}" for index in range(6)]
    assert [error is not None for error in table["error"].to_pylist()] == [False] * 3 + [True] + [False] * 2
    renamed = {"text": "input_input_text"}
    for column in given.schema.names[1:]:
        found = table[renamed.get(column, column)]
        assert found.to_pylist() == given[column].to_pylist()
        if column not in ("word", "in_struct", "in_list"):  # dictionaries: below
            assert found.type == given[column].type
            assert found.equals(given[column])
    assert len(table.schema) == len(RESULT) + len(given.schema) - 1


@pytest.mark.parametrize("name", SOURCES)
def test_dictionaries_stay_in_parquet_and_become_their_values_in_arrow(tmp_path: Path, name: str) -> None:
    opened = source(tmp_path, name)
    rows = [row(index) for index in range(6)]
    words = ["a", "b", "b", "c", "a", "d"]
    for format, kind in (("parquet", pa.dictionary(pa.int32(), pa.string())), ("arrow", pa.string())):
        table = written(tmp_path, rows, format, opened)  # type: ignore[arg-type]
        assert table.schema.field("word").type == kind
        assert table["word"].to_pylist() == words
        assert table["in_list"].to_pylist() == [[word] for word in words]
        assert table["in_struct"].to_pylist() == [{"word": word} for word in words]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", SOURCES)
def test_open_rows_of_a_typed_input_are_left_out(tmp_path: Path, format: Format, name: str) -> None:
    table = written(tmp_path, [row(1), row(5)], format, source(tmp_path, name))
    assert table["index"].to_pylist() == [1, 5]
    assert table["prompt"].to_pylist() == ["b", "d"]
    assert table["word"].to_pylist() == ["b", "d"]


@pytest.mark.parametrize("format", FORMATS)
def test_small_blocks_of_the_input_are_written_together(tmp_path: Path, format: Format) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"prompt": [str(n) for n in range(3000)]}), path, row_group_size=10)
    opened = Input.open([str(path)], tmp_path / "cache", scan=True)
    table = written(tmp_path, [row(n) for n in range(3000)], format, opened)
    assert table["prompt"].to_pylist() == [str(n) for n in range(3000)]
    assert all(column.num_chunks == 1 for column in table.columns)


@pytest.mark.parametrize("format", FORMATS)
def test_files_of_one_schema_keep_it_and_files_of_several_are_inferred(tmp_path: Path, format: Format) -> None:
    for name, kind in {"a": pa.int8(), "b": pa.int8(), "c": pa.int16()}.items():
        pq.write_table(pa.table({"n": pa.array([1], kind)}), tmp_path / f"{name}.parquet")
    rows = [row(index, {"n": 1}) for index in range(2)]
    for names, kind in (("ab", pa.int8()), ("ac", pa.int64())):
        opened = Input.open([str(tmp_path / f"{name}.parquet") for name in names], tmp_path / names, scan=True)
        assert written(tmp_path, rows, format, opened).schema.field("n").type == kind


def test_a_type_that_the_format_has_not_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "in.arrow"
    table = pa.table({"x": pa.array([(1, 2, 3)], pa.month_day_nano_interval())})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as write:
        write.write_table(table)
    opened = Input.open([str(path)], tmp_path / "cache", scan=True)
    assert written(tmp_path, [row(0)], "arrow", opened)["x"].equals(table["x"])
    with pytest.raises(CheckpointError, match=f"as parquet: .*batchgen merge --output-format jsonl {tmp_path}$"):
        written(tmp_path, [row(0)], "parquet", opened)


def test_an_openai_answer_among_typed_rows_is_refused_not_emptied(tmp_path: Path) -> None:
    answer = row(1)
    answer.request = REQUEST
    with pytest.raises(CheckpointError, match="r1 is an answer to an OpenAI request among plain rows"):
        written(tmp_path, [row(0), answer], "arrow", source(tmp_path, "in.arrow"))


@pytest.mark.parametrize("format", FORMATS)
def test_merged_from_a_run_folder(tmp_path: Path, format: Format) -> None:
    folder = made(tmp_path, 5)
    commit(folder, 1, 0, batch([4, 2, 0], failed=[2]))
    commit(folder, 1, 1, batch([3, 1]))
    path = merge_with(lambda path, lines: write_table(path, lines, format, None), folder, 5, f"generations.{format}")
    assert read(path, format).select(["index", "n", "text"]).to_pylist() == [
        {"index": index, "n": index, "text": None if index == 2 else "text"} for index in range(5)
    ]
    assert not list(folder.path.glob(".*"))
