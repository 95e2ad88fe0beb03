"""Arrow IPC: both kinds, compressed and not, and files that are damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pytest

from batchgen.formats import InputError
from batchgen.formats.input import Input
from batchgen.types import RowError

ROWS = [{"id": str(n), "text": "word " * n} for n in range(50)]
TABLE = pa.Table.from_pylist(ROWS)


def opened(path: Path, scan: bool = True) -> Input:
    return Input.open([str(path)], path.parent / "cache", scan=scan)


def write(path: Path, kind: str, compression: str | None, table: pa.Table = TABLE, rows: int = 7) -> None:
    new = {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}[kind]
    with new(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=rows)


@pytest.mark.parametrize("suffix", [".arrow", ".feather", ".ipc"])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("kind", ["file", "stream"])
def test_the_kind_is_seen_not_asked_for(kind: str, compression: str | None, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write(path, kind, compression)
    opened(path)
    for scan in (True, False):
        source = opened(path, scan)
        for _ in range(2):  # the second time, the lengths of record batches are known
            assert [row.value for row in source.rows(range(50))] == ROWS
            assert [row.value for row in source.rows(iter([3, 20, 48]))] == [ROWS[3], ROWS[20], ROWS[48]]


def test_feather_files(tmp_path: Path) -> None:
    feather.write_feather(TABLE, tmp_path / "a.feather")
    assert [row.value for row in opened(tmp_path / "a.feather").rows(range(50))] == ROWS


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_a_large_record_batch_is_read_in_pieces(kind: str, tmp_path: Path) -> None:
    table = pa.table({"n": range(5000)})
    write(tmp_path / "a.arrow", kind, None, table, rows=5000)
    source = opened(tmp_path / "a.arrow")
    assert [row.value for row in source.rows(range(0, 5000, 11))] == [{"n": n} for n in range(0, 5000, 11)]
    assert max(batch.num_rows for batch in source.batches()) <= 1024
    write(tmp_path / "b.arrow", kind, None, pa.table({"text": ["x" * 1_000_000] * 20}), rows=20)
    assert max(batch.num_rows for batch in opened(tmp_path / "b.arrow").batches()) <= 5


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("left", [0, 3, 200, 1000, -20])
def test_a_file_that_was_cut_off(kind: str, left: int, tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write(path, kind, None)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(InputError, match=r"a\.arrow cannot be read as Arrow"):
        opened(path)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_a_file_damaged_after_the_scan(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write(path, kind, "zstd")
    source = opened(path)
    content = path.read_bytes()
    middle = content.index(b"\x28\xb5\x2f\xfd", len(content) // 2)  # a Zstandard frame
    written = path.stat().st_mtime_ns
    path.write_bytes(content[:middle] + bytes(4) + content[middle + 4 :])
    os.utime(path, ns=(written, written))  # a disk that forgets, not somebody who writes
    with pytest.raises(InputError, match=r"a\.arrow (is damaged: rows|cannot be read as Arrow)"):
        list(source.rows(range(50)))


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    write(tmp_path / "a.arrow", "file", None, table)
    with pytest.raises(InputError, match=r"two columns of the same name\. Its columns: a, a"):
        opened(tmp_path / "a.arrow")


def test_a_value_that_python_cannot_hold_is_an_error_row(tmp_path: Path) -> None:
    no_text = pa.array([b"fine", b"\xff\xfe", b"fine too"]).view(pa.string())
    write(tmp_path / "a.arrow", "file", None, pa.table({"text": no_text}))
    first, bad, last = opened(tmp_path / "a.arrow").rows(range(3))
    assert (first.value, last.value) == ({"text": "fine"}, {"text": "fine too"})
    assert isinstance(bad.value, RowError)
    assert (bad.value.type, bad.value.line, bad.line) == ("malformed_value", 2, 2)
    assert bad.value.message.startswith("row 2 of a.arrow has a value that cannot be read: ")
