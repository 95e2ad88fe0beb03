"""Parquet: row groups, nested columns, damaged files."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.formats import InputError
from batchgen.formats.input import Input


def opened(path: Path, scan: bool = True) -> Input:
    return Input.open([str(path)], path.parent / "cache", scan=scan)


def test_nested_and_missing_values(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "hi"}], "when": datetime.date(2026, 1, 1), "raw": b"\xff", "x": 1.5},
        {"messages": None, "when": None, "raw": None, "x": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.pq")
    assert [row.value for row in opened(tmp_path / "a.pq").rows(range(2))] == rows


def test_a_large_row_group_is_read_in_pieces(tmp_path: Path) -> None:
    table = pa.table({"text": [f"{n} " * 20_000 for n in range(300)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300, use_dictionary=False)
    source = opened(tmp_path / "a.parquet")
    assert max(batch.num_rows for batch in source.batches()) < 100
    assert [row.value for row in source.rows(iter([250]))] == [{"text": "250 " * 20_000}]


def test_row_groups_without_a_wanted_row_are_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": range(300)}), path, row_group_size=100, compression="zstd", use_dictionary=False)
    source = opened(path)
    content = bytearray(path.read_bytes())
    page = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content[page : page + 60] = bytes(60)
    written = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(written, written))  # a disk that forgets, not somebody who writes
    wanted = [0, 99, 200, 299]
    assert [row.value for row in source.rows(iter(wanted))] == [{"n": n} for n in wanted]
    with pytest.raises(InputError, match=r"a\.parquet is damaged: rows 101 to 200 cannot be read"):
        list(source.rows(range(300)))
    assert [row.value for row in source.rows(iter(wanted))] == [{"n": n} for n in wanted]


def test_windows_do_not_decode_a_row_group_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": range(20_000)}), path, row_group_size=20_000, compression="zstd")
    source = opened(path)
    pool = pa.default_memory_pool()
    taken = []
    for begin in range(0, 20_000, 1000):
        before = pool.num_allocations()
        assert [row.value for row in source.rows(range(begin, begin + 1000))] == [
            {"n": n} for n in range(begin, begin + 1000)
        ]
        taken.append(pool.num_allocations() - before)
    assert taken[-1] < 2 * max(taken[1:5])


@pytest.mark.parametrize("left", [0, 3, 100, -1])
def test_a_file_that_was_cut_off(left: int, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": range(300)}), path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(InputError, match=r"a\.parquet cannot be read as Parquet"):
        opened(path)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"two columns of the same name\. Its columns: a, a"):
        opened(tmp_path / "a.parquet")
