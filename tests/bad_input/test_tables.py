"""Parquet, Arrow and folders of datasets: types that prompts cannot have, values that Python cannot, damaged files."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bad_input.command import answered, call

PROMPTS = pa.array(["one", "two", "three"])
COUNT = pa.array([1, 2, 3])
GOOD = pa.table({"id": ["a", "b", "c"], "prompt": PROMPTS})


def _parquet(table: pa.Table) -> bytes:
    packed = io.BytesIO()
    pq.write_table(table, packed, row_group_size=2)
    return packed.getvalue()


def _ipc(new: Callable[..., Any]) -> Callable[[pa.Table], bytes]:
    def pack(table: pa.Table) -> bytes:
        packed = io.BytesIO()
        with new(packed, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return packed.getvalue()

    return pack


_stream = _ipc(pa.ipc.new_stream)
PACKED = {"a.parquet": _parquet, "b.arrow": _ipc(pa.ipc.new_file), "c.arrow": _stream, "d": _stream}
every_format = pytest.mark.parametrize("name", PACKED, ids=["parquet", "file", "stream", "datasets"])


def write(folder: Path, name: str, content: bytes) -> Path:
    """The file, or the folder as datasets saves it."""
    path = folder / name
    if "." in name:
        path.write_bytes(content)
        return path
    path.mkdir()
    (path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (path / "data.arrow").write_bytes(content)
    return path / "data.arrow"


NO_TEXT = 'the "prompt" column must hold a text, not '
NULL = 'the "prompt" column is null; give this row a text'
NO_ID = "id must be a text that is not empty or a whole number, not "
HOT = "temperature must be a number from 0 to 100, not "
FEW = "max_new_tokens must be a whole number, 1 or more, not "
UNREADABLE = " has a value that cannot be read: "

# Columns beside or in the place of the prompt; then, for each row, what its sentence says, or None where it is good.
COLUMNS: dict[str, tuple[dict[str, pa.Array], list[str | None]]] = {
    "dictionary": ({"prompt": PROMPTS.dictionary_encode()}, [None] * 3),
    "large text": ({"prompt": PROMPTS.cast(pa.large_string())}, [None] * 3),
    "text view": ({"prompt": PROMPTS.cast(pa.string_view())}, [None] * 3),
    "nested": ({"x": pa.array([{"a": [1, None]}, None, {"a": []}])}, [None] * 3),
    "map": ({"x": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64()))}, [None] * 3),
    "timestamp": ({"x": pa.array([1, 2, 10**18 + 1], pa.timestamp("ns"))}, [None] * 3),
    "decimal": ({"x": COUNT.cast(pa.decimal128(21, 1))}, [None] * 3),
    "binary": ({"x": pa.array([b"a", b"\xff", None])}, [None] * 3),
    "not a number": ({"x": pa.array([float("nan"), float("inf"), -0.0])}, [None] * 3),
    "half": ({"x": pa.array(np.array([1, np.nan, 3], np.float16))}, [None] * 3),
    "nulls": ({"x": pa.nulls(3)}, [None] * 3),
    "zero bytes": ({"x": pa.array(["\0", "a\0", ""])}, [None] * 3),
    "binary prompt": ({"prompt": pa.array([b"a", b"\xff", None])}, [NO_TEXT + "a value of type bytes"] * 2 + [NULL]),
    "nested prompt": ({"prompt": pa.array([["a"], None, []])}, [NO_TEXT + "a list", NULL, NO_TEXT + "an empty list"]),
    "number prompt": ({"prompt": COUNT}, [NO_TEXT + "1", NO_TEXT + "2", NO_TEXT + "3"]),
    "timestamp prompt": ({"prompt": COUNT.cast(pa.timestamp("us"))}, [NO_TEXT + "a value of type datetime"] * 3),
    "null prompt": ({"prompt": pa.array(["one", None, "three"])}, [None, NULL, None]),
    "no prompt": ({"prompt": pa.nulls(3)}, [NULL] * 3),
    "decimal id": ({"id": COUNT.cast(pa.decimal128(21, 1))}, [NO_ID + "a value of type Decimal"] * 3),
    "float id": ({"id": pa.array([1.0, 2.5, float("nan")])}, [None, NO_ID + "2.5", NO_ID + "nan"]),
    "repeated id": ({"id": pa.array([7, 8, 7])}, [None, None, 'the id "7" is that of line 1 of ']),
    "null id": ({"id": pa.array(["a", None, "b"])}, [None] * 3),
    "no UTF-8": ({"x": pa.array([b"a", b"\xff", b"c"]).view(pa.string())}, [None, UNREADABLE, None]),
    "a date after 9999": ({"x": pa.array([1, 2, 2**31 - 1], pa.date32())}, [None, None, UNREADABLE]),
    "two fields of a name": ({"x": pa.StructArray.from_arrays([COUNT, COUNT], ["a", "a"])}, [UNREADABLE] * 3),
    "hot": ({"temperature": pa.array([0.5, float("nan"), 1e9])}, [None, HOT + "nan", HOT + "1000000000.0"]),
    "few tokens": ({"max_new_tokens": pa.array([8.0, 2.5, -1.0])}, [None, FEW + "2.5", FEW + "-1"]),
    "stop": ({"stop": pa.array([["x"], ["x", None], []])}, [None, "stop must be a text or a list of texts", None]),
}  # fmt: skip


@every_format
def test_types_that_prompts_cannot_have_are_error_rows(name: str, tmp_path: Path) -> None:
    names = []
    for case, (columns, _) in COLUMNS.items():
        names.append(f"{case} {name}")
        write(tmp_path, names[-1], PACKED[name](pa.table({"prompt": PROMPTS, **columns})))
    ended = call(tmp_path, "run", *names, "-o", "out", "--engine", "echo")
    assert ended.code == 3, ended.err
    rows = iter(answered(tmp_path / "out"))
    for file, (_, expected) in zip(names, COLUMNS.values(), strict=True):
        for number, sentence in enumerate(expected, 1):
            row = next(rows)
            if sentence is None:
                assert (row["error"], row["text"]) == (None, PROMPTS[number - 1].as_py()), (file, row)
                continue
            assert row["error"]["line"] == number
            assert row["error"]["message"].startswith((f"line {number} of {file}: ", f"row {number} of {file} "))
            assert sentence in row["error"]["message"]
    assert not list(rows)


@every_format
@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (pa.table({"prompt": pa.array([], pa.string())}), "there is no row in "),
        (pa.table({}), "there is no row in "),
        (pa.Table.from_arrays([PROMPTS, PROMPTS], ["x", "x"]), "it has two columns of the same name"),
    ],
    ids=["no rows", "no columns", "two columns of a name"],
)
def test_a_table_without_rows_or_with_columns_of_one_name_is_refused(
    table: pa.Table, sentence: str, name: str, tmp_path: Path
) -> None:
    write(tmp_path, name, PACKED[name](table))
    ended = call(tmp_path, "run", name, "-o", "out", "--engine", "echo")
    assert (ended.code, ended.out) == (4, ""), ended
    assert f"{name}" in ended.err
    assert sentence in ended.err


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut by half": lambda content: content[: len(content) // 2],
    "cut by 1": lambda content: content[:-1],
    "cut by 8": lambda content: content[:-8],
    "something behind": lambda content: content + b"garbage!",
    "twice": lambda content: content * 2,
    "another magic": lambda content: b"XXXX" + content[4:-4] + b"XXXX",
    "nothing but zeros": lambda content: bytes(len(content)),
    "text": lambda content: b'{"prompt":"a"}\n' * 9,
}


@every_format
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_table_that_was_cut_off_or_put_together_is_refused(damage: str, name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, DAMAGE[damage](PACKED[name](GOOD)))
    ended = call(tmp_path, "run", name, "-o", "out", "--engine", "echo")
    assert (ended.code, ended.out) == (4, ""), ended
    assert "Traceback" not in ended.err
    assert str(path.relative_to(tmp_path)) in ended.err
    if damage == "twice":
        assert "in one, of which one would not be read" in ended.err or "bytes stand behind the end of its" in ended.err
    if damage == "cut by 8" and name in ("c.arrow", "d"):  # between two record batches: pyarrow reads it without a word
        assert "it ends without the mark of a stream's end: it was cut off, or is still being written" in ended.err


@every_format
@pytest.mark.parametrize("column", ["badname", "x"], ids=["of a column", "within a column"])
def test_a_name_within_a_table_that_is_no_utf8_is_refused(column: str, name: str, tmp_path: Path) -> None:
    table = pa.table({"prompt": PROMPTS, column: pa.array([{"badname": 1}] * 3)})
    content = PACKED[name](table).replace(b"badname", b"bad\xffame")
    write(tmp_path, name, content)
    ended = call(tmp_path, "run", name, "-o", "out", "--engine", "echo")
    assert (ended.code, ended.out) == (4, ""), ended
    assert f"{name}" in ended.err
    assert "Traceback" not in ended.err


def test_text_that_looks_like_two_files_is_text(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.arrow"):
        write(tmp_path, name, PACKED[name](pa.table({"prompt": ["PAR1PAR1", "ARROW1ARROW1", "x"]})))
        ended = call(tmp_path, "run", name, "-o", name[0], "--engine", "echo")
        assert ended.code == 0, ended.err


def _without_offsets(content: bytes, text: bytes) -> bytes:
    """`content` with the offsets of a column whose texts are `text`, put together, pointing far away."""
    begin = content.index(text)
    offsets = content.rindex(np.array([0, 3, 6, 11], np.int32).tobytes()[4:], 0, begin)
    return content[:offsets] + np.array([3, 2**30, 11], np.int32).tobytes() + content[offsets + 12 :]


@pytest.mark.parametrize("format", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("name", ["b.arrow", "c.arrow", "d"])
def test_values_that_point_outside_the_file_are_error_rows(name: str, format: str, tmp_path: Path) -> None:
    """pyarrow follows such an offset, and the process ends with a segmentation fault."""
    packed = io.BytesIO()
    new = pa.ipc.new_file if name == "b.arrow" else pa.ipc.new_stream
    with new(packed, GOOD.schema) as writer:
        writer.write_table(GOOD)
    write(tmp_path, name, _without_offsets(packed.getvalue(), b"onetwothree"))
    ended = call(tmp_path, "run", name, "-o", "out", "--engine", "echo", "--output-format", format)
    assert ended.code == 3, ended.err
    assert "1 of 3 rows good, 2 failed" in ended.err
    errors = (tmp_path / "out/errors.jsonl").read_text()
    assert f"row 2 of {name} has a value that cannot be read: " in errors
    assert f"row 3 of {name} has a value that cannot be read: " in errors


def _fewer_rows(content: bytes) -> bytes:
    """A Parquet file whose footer says that the first row group has more rows than are in it: Thrift's varints."""
    return content.replace(b"\x16\x04\x26", b"\x16\x08\x26").replace(b"\x16\x04\x00", b"\x16\x08\x00")


def test_a_table_with_fewer_rows_than_it_says_is_refused_or_lists_them(tmp_path: Path) -> None:
    whole = PACKED["a.parquet"](GOOD)
    content = _fewer_rows(whole)
    assert content != whole
    write(tmp_path, "a.parquet", content)
    ended = call(tmp_path, "run", "a.parquet", "-o", "out", "--engine", "echo")
    assert ended.code == 4, ended
    assert "a.parquet" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("name", ["a.parquet", "b.arrow", "c.arrow"])
def test_a_name_that_is_no_utf8(name: str, tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff" + name.encode())
    write(tmp_path, odd, PACKED[name](pa.table({"prompt": PROMPTS})))
    ended = call(tmp_path, "run", odd, "-o", "out", "--engine", "echo")
    assert ended.code == 0, ended.err
    assert answered(tmp_path / "out")[0]["id"] == f"\\xff{name}:1"
