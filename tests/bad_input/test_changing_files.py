"""Files that grow, shrink, are replaced or go while a run reads them, or between two starts: no row of another file."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bad_input.command import answered, call
from tests.commands.starts import Started, batchgen, recorded, until

# More than are read at once; a commit every few of them, and time enough between two.
ROWS = [{"id": f"row-{number}", "prompt": f"{number:04d}"} for number in range(2100)]
COMMAND = ("-o", "out", "--engine", "echo", "--set", "seconds=0.0002", "--batch-size", "100")


def _lines(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def _gzip(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def _parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def _arrow(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=500)


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"prompt":"more"}\n')


def _shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _replace(path: Path) -> None:
    """Another file of the same size, with line ends in the same places."""
    content = path.read_bytes()
    other = path.with_name("other")
    other.write_bytes(content.replace(b'"1', b'"2') if path.suffix == ".jsonl" else content[:-20][::-1] + content[-20:])
    other.rename(path)


def _delete(path: Path) -> None:
    path.unlink()


CASES = [
    ("a.jsonl", _lines, _shrink, "a.jsonl has changed: it had 76590 bytes when the run started and has 38295 now"),
    (
        "a.jsonl",
        _lines,
        _replace,
        "a.jsonl has changed: it is as long as when the run started, but holds something else",
    ),
    ("a.jsonl", _lines, _delete, "cannot open a.jsonl: No such file or directory"),
    ("a.parquet", _parquet, _replace, "a.parquet has changed: it is as long as when the run started"),
    ("a.arrow", _arrow, _shrink, "a.arrow has changed: it had "),
]


@pytest.mark.parametrize(("name", "write", "change", "sentence"), CASES)
def test_a_file_that_changes_while_it_is_read_ends_the_run_and_loses_nothing(
    name: str, write: Callable[[Path], None], change: Callable[[Path], None], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    with Started(batchgen("run", name, *COMMAND), tmp_path) as process:
        until(lambda: recorded(tmp_path / "out"), process)
        change(path)
        ended = process.end()
    assert ended.code == 4, ended
    assert "Traceback" not in ended.err
    assert sentence in ended.err
    done = recorded(tmp_path / "out")
    assert 0 < done < len(ROWS)
    if change is not _delete:
        changed = call(tmp_path, "run", name, *COMMAND)
        assert changed.code == 4
        assert "is not what the run began with" in changed.err or "cannot be read" in changed.err
    write(path)
    assert call(tmp_path, "run", name, "-o", "out", "--engine", "echo").code == 0
    assert [(row["id"], row["text"]) for row in answered(tmp_path / "out")] == [
        (row["id"], row["prompt"]) for row in ROWS
    ]


@pytest.mark.parametrize(
    ("name", "write", "change"),
    [
        ("a.jsonl", _lines, Path.touch),
        ("a.jsonl", _lines, _grow),
        ("a.jsonl.gz", _gzip, Path.unlink),
        ("a.jsonl.gz", _gzip, _shrink),
    ],
    ids=["touched", "grown", "packed and deleted", "packed and cut"],
)
def test_a_file_that_holds_the_same_or_was_unpacked_is_read_to_its_end(
    name: str, write: Callable[[Path], None], change: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path / name)
    with Started(batchgen("run", name, *COMMAND), tmp_path) as process:
        until(lambda: recorded(tmp_path / "out"), process)
        change(tmp_path / name)
        ended = process.end()
    assert ended.code == 0, ended
    assert [row["text"] for row in answered(tmp_path / "out")] == [row["prompt"] for row in ROWS]
    if change is _grow:
        again = call(tmp_path, "run", name, *COMMAND)
        assert again.code == 0, again
        assert [row["text"] for row in answered(tmp_path / "out")] == [*(row["prompt"] for row in ROWS), "more"]


def test_a_line_that_is_completed_between_two_starts_is_another_input(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id":"a","prompt":"one"}\n{"id":"b","prompt":"tw')
    ended = call(tmp_path, "run", "a.jsonl", "-o", "out", "--engine", "echo")
    assert ended.code == 3
    first, torn = answered(tmp_path / "out")
    assert (first["text"], torn["error"]["type"]) == ("one", "malformed_json")
    assert "line 2 of a.jsonl is not valid JSON: Unterminated string" in torn["error"]["message"]
    with path.open("ab") as file:
        file.write(b'o"}\n')
    again = call(tmp_path, "run", "a.jsonl", "-o", "out", "--engine", "echo")
    assert again.code == 4
    assert "a.jsonl is not what the run began with: it holds something else, first in line 2" in again.err
    assert "start a new run with another -o" in again.err
    path.unlink()
    gone = call(tmp_path, "run", "a.jsonl", "-o", "out", "--engine", "echo")
    assert (gone.code, gone.err) == (4, "Error: there is no file a.jsonl\n")
    assert answered(tmp_path / "out") == [first, torn]
