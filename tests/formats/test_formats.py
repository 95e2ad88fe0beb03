"""What every format promises, tried on each one found; and what `Input` makes of several files."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchgen.formats
from batchgen.formats import InputError, Source, Value
from batchgen.formats.input import Input, find
from batchgen.types import Row, RowError

Rows = Sequence[dict[str, object]]
Write = Callable[[Path, Rows], Path]

SCHEMA = pa.schema([("id", pa.string()), ("n", pa.int64()), ("tags", pa.list_(pa.string()))])
ROWS: Rows = [{"id": f"row {n}", "n": n, "tags": ["ü", "🙂"][: n % 3]} for n in range(100)]


def write_jsonl(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), path, row_group_size=30)
    return path


def write_arrow(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.arrow"
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(list(rows), SCHEMA), max_chunksize=30)
    return path


def write_folder(folder: Path, rows: Rows) -> Path:
    from datasets import Dataset

    path = folder / "rows"
    dataset = Dataset(pa.Table.from_pylist(list(rows), SCHEMA))
    dataset.save_to_disk(str(path), num_shards=3 if rows else 1)
    return path


FORMATS = sorted(
    module.name
    for module in pkgutil.iter_modules(batchgen.formats.__path__)
    if not module.name.startswith("_") and module.name != "input"
)


@pytest.fixture(params=FORMATS)
def write(request: pytest.FixtureRequest) -> Write:
    """Writes rows into a folder in one of the formats. A new format needs a `write_NAME` above."""
    function: Write = globals()[f"write_{request.param}"]
    return function


def opened(path: Path, cache: Path, scan: bool = True) -> Input:
    return Input.open([str(path)], cache, scan=scan)


def shrink(path: Path) -> None:
    """Cuts a byte off the file, or off the first data file of the folder."""
    file = path if path.is_file() else min(path.glob("*.arrow"))
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_defines_one_format(name: str) -> None:
    module = importlib.import_module(f"batchgen.formats.{name}")
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Source)]
    assert len([value for value in found if value is not Source]) == 1


def test_every_format_has_the_same_rows_under_the_same_numbers(write: Write, tmp_path: Path) -> None:
    source = opened(write(tmp_path, ROWS), tmp_path / "cache")
    assert len(source) == 100
    name = source.sources[0].name
    assert list(source.rows(range(100))) == [Row(n, name, n + 1, row) for n, row in enumerate(ROWS)]


@pytest.mark.parametrize("numbers", [[], [0], [99], [0, 99], [29, 30, 31, 60], range(3, 100, 8), [5, 6, 7, 40, 42, 90]])
def test_rows_may_be_left_out(write: Write, tmp_path: Path, numbers: Sequence[int]) -> None:
    source = opened(write(tmp_path, ROWS), tmp_path / "cache")
    assert [(row.index, row.line, row.value) for row in source.rows(iter(numbers))] == [
        (n, n + 1, ROWS[n]) for n in numbers
    ]


def test_reading_can_stop_and_start_again(write: Write, tmp_path: Path) -> None:
    source = opened(write(tmp_path, ROWS), tmp_path / "cache")
    assert next(source.rows(range(50, 100))).value == ROWS[50]
    assert next(source.rows(range(100))).value == ROWS[0]


def test_calls_may_take_turns(write: Write, tmp_path: Path) -> None:
    source = opened(write(tmp_path, ROWS), tmp_path / "cache")
    for begin in range(0, 100, 9):
        assert [row.value for row in source.rows(range(begin, min(begin + 9, 100)))] == ROWS[begin : begin + 9]
    front, back = source.rows(range(50)), source.rows(range(50, 100))
    turns = [row.value for pair in zip(front, back, strict=True) for row in pair]
    assert turns == [row for pair in zip(ROWS[:50], ROWS[50:], strict=True) for row in pair]


def test_a_file_without_rows(write: Write, tmp_path: Path) -> None:
    source = opened(write(tmp_path, []), tmp_path / "cache")
    assert len(source) == 0
    assert list(source.rows(range(0))) == []
    assert source.duplicates(lambda row: "same") == {}


def test_the_digest_is_that_of_the_content(write: Write, tmp_path: Path) -> None:
    digests = []
    for name, rows in {"first": ROWS, "again": ROWS, "other": [*ROWS[:-1], {"id": "x", "n": 1, "tags": []}]}.items():
        (tmp_path / name).mkdir()
        digests.append(opened(write(tmp_path / name, rows), tmp_path / name / "cache").digest)
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 64


def test_another_process_takes_what_the_scan_left(write: Write, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    scanned = opened(path, tmp_path / "cache")
    taken = opened(path, tmp_path / "cache", scan=False)
    assert (len(taken), taken.digest) == (len(scanned), scanned.digest)
    assert list(taken.rows(range(100))) == list(scanned.rows(range(100)))


def test_a_file_that_nobody_scanned(write: Write, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"00000.json: No such file"):
        opened(write(tmp_path, ROWS), tmp_path / "cache", scan=False)


def test_a_damaged_record_of_the_scan(write: Write, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    opened(path, tmp_path / "cache")
    (tmp_path / "cache" / "00000.json").write_text("{}")
    with pytest.raises(InputError, match=r"damaged\. Delete it"):
        opened(path, tmp_path / "cache", scan=False)


def test_a_file_that_changed_since_the_scan(write: Write, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    source = opened(path, tmp_path / "cache")
    shrink(path)
    with pytest.raises(InputError, match="has changed"):
        next(source.rows([0]))
    with pytest.raises(InputError, match="has changed"):
        opened(path, tmp_path / "cache", scan=False)


def test_a_file_that_is_gone(write: Write, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    source = opened(path, tmp_path / "cache")
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match="cannot open"):
        next(source.rows([0]))


def test_typed_columns_keep_their_types(write: Write, tmp_path: Path) -> None:
    source = opened(write(tmp_path, ROWS), tmp_path / "cache")
    schema = source.schema()
    if schema is None:  # a format without types has no batches either
        with pytest.raises(NotImplementedError):
            list(source.batches())
        return
    assert schema.field("n").type == pa.int64()
    batches = list(source.batches())
    assert all(batch.schema.equals(schema) for batch in batches)
    assert pa.Table.from_batches(batches, schema).to_pylist() == list(ROWS)


def test_a_file_of_something_else(write: Write, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    if find(path).rows is not Source.rows:  # a format of lines takes any bytes; its bad lines are error rows
        path.write_bytes(b"no such thing\n" * 3)
        assert [type(row.value) for row in opened(path, tmp_path / "cache").rows(range(3))] == [RowError] * 3
        return
    for file in [path] if path.is_file() else path.glob("*.arrow"):
        file.write_bytes(b"no such thing" * 10)
    with pytest.raises(InputError, match="cannot be read as"):
        opened(path, tmp_path / "cache")


def test_files_of_several_formats_are_one_run_of_rows(tmp_path: Path) -> None:
    files = [globals()[f"write_{name}"](tmp_path, ROWS[:7]) for name in FORMATS]
    source = Input.open([str(file) for file in files], tmp_path / "cache", scan=True)
    assert len(source) == 7 * len(FORMATS)
    wanted = [0, 5, 8, 13, 14, 21, 27]
    assert [(row.index, row.source, row.line) for row in source.rows(iter(wanted))] == [
        (n, files[n // 7].name, n % 7 + 1) for n in wanted
    ]
    assert [row.value for row in source.rows(range(len(source)))] == list(ROWS[:7]) * len(FORMATS)
    assert source.schema() is None


def test_files_with_the_same_columns_have_a_schema_together(tmp_path: Path) -> None:
    files = [str(write_arrow(tmp_path, ROWS[:7])), str(write_parquet(tmp_path, ROWS[7:9]))]
    source = Input.open(files, tmp_path / "cache", scan=True)
    assert source.schema() is not None
    assert pa.Table.from_batches(source.batches()).to_pylist() == list(ROWS[:9])


def lines(path: Path, *ids: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": id}) + "\n" for id in ids))
    return path


def test_a_pattern_takes_files_by_name(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        lines(tmp_path / f"{name}.jsonl", name)
    source = Input.open([f"{tmp_path}/[ab].jsonl", f"{tmp_path}/c*"], tmp_path / "cache", scan=True)
    assert [row.source for row in source.rows(range(3))] == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_a_file_with_a_pattern_for_a_name(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", "a")
    path = lines(tmp_path / "[a].jsonl", "literal")
    assert [row.value for row in opened(path, tmp_path / "cache").rows([0])] == [{"id": "literal"}]


@pytest.mark.parametrize(
    ("paths", "sentence"),
    [
        ([], "there is no input"),
        (["none*.jsonl"], r"no file matches .*none\*.jsonl"),
        (["none.jsonl"], "there is no file .*none.jsonl"),
        (["a.txt"], r"a.txt is of no known format: it must be a file that ends in .*\.jsonl, .*\.parquet"),
        (["a.jsonl", "a.jsonl"], "a.jsonl is named twice"),
        (["a.jsonl", "./b/../*.jsonl"], "a.jsonl is named twice"),
    ],
)
def test_input_that_cannot_be(tmp_path: Path, paths: list[str], sentence: str) -> None:
    lines(tmp_path / "a.jsonl", "a")
    lines(tmp_path / "a.txt", "a")
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match=sentence):
        Input.open([f"{tmp_path}/{path}" for path in paths], tmp_path / "cache", scan=True)


def test_other_files_than_were_scanned(tmp_path: Path) -> None:
    opened(lines(tmp_path / "a.jsonl", "a"), tmp_path / "cache")
    with pytest.raises(InputError, match=r"file 1 of the input is b.jsonl now, but was a.jsonl"):
        opened(lines(tmp_path / "b.jsonl", "a"), tmp_path / "cache", scan=False)


def test_files_of_the_same_name_are_told_apart_wherever_they_lie(tmp_path: Path) -> None:
    for place in ("here", "there"):
        lines(tmp_path / place / "x" / "train" / "part.jsonl", "1")
        lines(tmp_path / place / "x" / "test" / "part.jsonl", "2")
        lines(tmp_path / place / "other.jsonl", "3")
    paths = ["x/train/part.jsonl", "x/test/part.jsonl", "other.jsonl"]
    inputs = [
        Input.open([f"{tmp_path}/{place}/{path}" for path in paths], tmp_path / place / "cache", scan=True)
        for place in ("here", "there")
    ]
    assert inputs[0].digest == inputs[1].digest
    assert [source.name for source in inputs[0].sources] == ["train/part.jsonl", "test/part.jsonl", "other.jsonl"]
    assert list(inputs[0].rows(range(3))) == list(inputs[1].rows(range(3)))


def test_rows_moved_to_another_file_are_another_input(tmp_path: Path) -> None:
    one = [str(lines(tmp_path / "a.jsonl", "1", "2")), str(lines(tmp_path / "b.jsonl", "3"))]
    two = [str(lines(tmp_path / "c.jsonl", "1")), str(lines(tmp_path / "d.jsonl", "2", "3"))]
    assert Input.open(one, tmp_path / "1", scan=True).digest != Input.open(two, tmp_path / "2", scan=True).digest


class Colliding(str):
    """A text whose hash is that of any other."""

    def __hash__(self) -> int:
        return 7


def id_of(value: Value) -> str | None:
    assert isinstance(value, dict)
    id = value["id"]
    assert isinstance(id, str)
    return id or None


@pytest.mark.parametrize("kind", [str, Colliding])
def test_a_repeated_id_points_to_its_first_use(tmp_path: Path, kind: type[str]) -> None:
    first = lines(tmp_path / "a.jsonl", "x", "", "y", "z", "y", "")
    # A row without an id makes each file be read by `id_of`, whose hashes are those of `kind`.
    second = lines(tmp_path / "b.jsonl", "w", "x", "y", "v", "")
    source = Input.open([str(first), str(second)], tmp_path / "cache", scan=True)
    assert source.duplicates(lambda value: (id := id_of(value)) and kind(id)) == {
        4: "line 3 of a.jsonl",
        7: "line 1 of a.jsonl",
        8: "line 3 of a.jsonl",
    }


def test_ids_of_two_files_differ_by_their_files_names(tmp_path: Path) -> None:
    first = lines(tmp_path / "a.jsonl", "x", "y", "x")
    second = lines(tmp_path / "b.jsonl", "y", "x", "", "3")
    pq.write_table(pa.table({"id": ["x", "z", "z"]}), tmp_path / "c.parquet")
    files = [str(first), str(second), str(tmp_path / "c.parquet")]
    source = Input.open(files, tmp_path / "cache", scan=True)
    # The row without an id is called b.jsonl:3, and so is the one behind it.
    assert source.duplicates(id_of, by_file=True) == {
        2: "line 1 of a.jsonl",
        6: "line 3 of b.jsonl",
        9: "line 2 of c.parquet",
    }


@pytest.mark.parametrize("few", [0, 1000])
def test_no_id_is_repeated(tmp_path: Path, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchgen.formats.input._FEW", few)
    source = opened(lines(tmp_path / "a.jsonl", *map(str, range(1000))), tmp_path / "cache")
    assert source.duplicates(id_of) == {}
