"""`batchgen merge`: the output files again, or of an unfinished run."""

from __future__ import annotations

import signal
from pathlib import Path

import pyarrow.parquet as pq

from tests.commands.starts import (
    Started,
    batchgen,
    call,
    echo,
    found,
    prompts,
    read_rows,
    recorded,
    slow_echo,
    until,
    write_rows,
)


def test_merge_writes_the_same_files_again_and_prints_the_path(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", [*prompts(20), "{broken"])
    call(tmp_path, *echo(rows))
    names = ("generations.jsonl", "errors.jsonl", "timing.jsonl")
    before = {name: (tmp_path / "p" / name).read_bytes() for name in names}
    for name in names:
        (tmp_path / "p" / name).unlink()
    ended = call(tmp_path, "merge", "p")
    assert (ended.code, ended.out, ended.err) == (0, "p/generations.jsonl\n", "")
    assert {name: (tmp_path / "p" / name).read_bytes() for name in names} == before


def test_merge_of_an_unfinished_run_leaves_open_rows_out_and_says_so(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", prompts(200))
    out = tmp_path / "p"
    with Started(batchgen(*slow_echo(rows)), tmp_path) as process:
        until(lambda: recorded(out), process)
        process.send(signal.SIGTERM)
        process.end()
    good = found(out).good
    ended = call(tmp_path, "merge", "p", "--output-format", "parquet")
    assert (ended.code, ended.out) == (0, "p/generations.parquet\n")
    assert ended.err == f"batchgen: {200 - good} of 200 rows are open and left out\n"
    assert pq.read_table(out / "generations.parquet").num_rows == good
    assert call(tmp_path, *echo(rows)).code == 0
    assert [row["index"] for row in read_rows(out / "generations.jsonl")] == list(range(200))
