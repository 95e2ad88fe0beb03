"""Blocks that hold more or fewer rows than they say: no row gets another's number."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from batchgen.formats import Block, InputError, Scan, Source
from batchgen.formats._record_batches import readable


class Lying(Source):
    """Two blocks that are said to have five rows each; the first has `rows`."""

    rows_there = 5

    def scan(self) -> Scan:
        return Scan("", self.path.stat().st_size, 10)

    def blocks(self) -> Iterator[Block]:
        for begin, rows in ((0, self.rows_there), (5, 5)):
            batch = pa.RecordBatch.from_pydict({"n": list(range(begin, begin + rows))})
            yield Block(5, partial(iter, [batch] if rows else []))


def opened(folder: Path, rows: int) -> Lying:
    (folder / "a").write_bytes(b"")
    source = Lying(folder / "a", "a", folder / "cache", 0, folder / "cache")
    source.rows_there = rows
    return source


@pytest.mark.parametrize(("rows", "sentence"), [(0, "fewer"), (3, "fewer"), (7, "more")])
def test_a_block_of_other_length_than_it_says(rows: int, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=rf"a is damaged: rows 1 to 5 cannot be read \(there are {sentence} than the 5"
    ):
        list(opened(tmp_path, rows).rows(range(10)))


def test_a_block_that_is_as_long_as_it_says_or_that_nobody_asks_for(tmp_path: Path) -> None:
    assert [value for _, _, value in opened(tmp_path, 5).rows(range(10))] == [{"n": number} for number in range(10)]
    assert [value for _, _, value in opened(tmp_path, 5).rows([6, 9])] == [{"n": 6}, {"n": 9}]


def test_rows_that_are_damaged_are_nulls_for_whoever_writes_them() -> None:
    no_text = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    batch = pa.RecordBatch.from_arrays([no_text, pa.array([1, 2, 3])], ["text", "n"])
    assert readable(batch).to_pylist() == [{"text": "a", "n": 1}, {"text": None, "n": None}, {"text": "c", "n": 3}]
    good = batch.select(["n"])
    assert readable(good) is good
