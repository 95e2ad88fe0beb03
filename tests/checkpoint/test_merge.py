"""The output files: every row once, in input order."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchgen.checkpoint import CheckpointError, RunFolder, merge, merge_with, status, write_lines
from tests.checkpoint.folders import batch, commit, made, objects, output, start


def merged(folder: RunFolder, rows: int) -> list[dict[str, object]]:
    path = merge_with(write_lines, folder, rows, "generations.jsonl")
    assert path == folder.path / "generations.jsonl"
    assert not [entry for entry in folder.path.iterdir() if entry.name.startswith(".")]
    return objects(path)


def errors(folder: RunFolder) -> list[object]:
    return [row["index"] for row in objects(folder.path / "errors.jsonl")]


def test_rows_of_all_streams_stand_in_input_order_failed_ones_in_their_place(tmp_path: Path) -> None:
    folder = made(tmp_path, 9)
    commit(folder, 1, 0, batch([8, 2, 0], failed=[2]), batch([6, 4]))
    commit(folder, 1, 1, batch([1, 3, 7, 5], failed=[7]))
    rows = merged(folder, 9)
    assert [row["index"] for row in rows] == list(range(9))
    assert [row["index"] for row in rows if row["error"] is not None] == [2, 7]
    assert [row["id"] for row in rows] == [f"r{index}" for index in range(9)]
    assert objects(folder.path / "errors.jsonl") == [rows[2], rows[7]]


def test_a_later_success_replaces_a_failure_and_a_later_failure_an_earlier_one(tmp_path: Path) -> None:
    folder = made(tmp_path, 4)
    commit(folder, 1, 0, batch([0, 1, 2, 3], "first", failed=[1, 2, 3]))
    first = merged(folder, 4)
    assert errors(folder) == [1, 2, 3]
    commit(folder, 2, 0, batch([0, 1, 2], "second", failed=[0, 2]))
    commit(folder, 3, 0, batch([1], "third"))
    rows = merged(folder, 4)
    assert [row["text"] for row in rows] == ["first", "second", None, None]
    assert rows[3] == first[3]
    assert errors(folder) == [2, 3]


def test_of_two_failures_the_later_one_is_told(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    for attempt in (1, 2):
        one = batch([0], failed=[0])
        error = one.generations[0].error
        assert error is not None
        error.message = f"attempt {attempt}"
        commit(folder, attempt, 0, one)
    (row,) = merged(folder, 1)
    assert row["error"] == {"type": "too_long", "message": "attempt 2", "line": 1}


def test_the_first_of_two_good_records_wins(tmp_path: Path) -> None:
    folder = made(tmp_path, 2)
    commit(folder, 1, 1, batch([0, 1], "forgotten process"))
    commit(folder, 2, 0, batch([1, 0], "later start"))
    assert [row["text"] for row in merged(folder, 2)] == ["forgotten process"] * 2


def test_a_damaged_batch_gives_way_to_a_later_record(tmp_path: Path) -> None:
    folder = made(tmp_path, 3)
    generations, _ = commit(folder, 1, 0, batch([0, 1]), batch([2]))
    generations.write_bytes(generations.read_bytes().replace(b"text", b"tent", 1))
    commit(folder, 2, 0, batch([0, 1], "again"))
    assert [row["text"] for row in merged(folder, 3)] == ["again", "again", "text"]


@pytest.fixture
def few_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 15, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_files")
def test_more_files_than_a_process_may_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "_OPEN_FILES", 8)
    folder = made(tmp_path, 120)
    for attempt in range(1, 41):
        commit(folder, attempt, 0, batch(range(attempt - 1, 120, 40)))
    assert [row["index"] for row in merged(folder, 120)] == list(range(120))


@pytest.mark.parametrize("span", [0, 300, 64 << 20])
@pytest.mark.parametrize("block", [1, 7, 4096])
def test_rows_that_lie_far_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, span: int, block: int) -> None:
    monkeypatch.setattr(merge, "_SPAN", span)
    monkeypatch.setattr(merge, "_BLOCK", block)
    folder = made(tmp_path, 100)
    order = random.Random(span).sample(range(100), 100)
    for stream in range(3):
        rows = order[stream::3]
        batches = [batch(rows[n : n + 5], "é" * (n + 1), failed=rows[n : n + 1]) for n in range(0, len(rows), 5)]
        commit(folder, 1, stream, *batches)
    assert [row["index"] for row in merged(folder, 100)] == list(range(100))
    assert errors(folder) == sorted(row for stream in range(3) for row in order[stream::3][::5])


def test_a_run_without_rows_has_empty_files(tmp_path: Path) -> None:
    folder = made(tmp_path, 0)
    assert merged(folder, 0) == []
    assert errors(folder) == objects(folder.path / "timing.jsonl") == []


def test_open_rows_are_left_out(tmp_path: Path) -> None:
    folder = made(tmp_path, 10_000)
    commit(folder, 1, 0, batch([9_999, 5, 4_095, 4_096]))
    assert [row["index"] for row in merged(folder, 10_000)] == [5, 4_095, 4_096, 9_999]


def test_merging_again_replaces_the_files(tmp_path: Path) -> None:
    folder = made(tmp_path, 2)
    commit(folder, 1, 0, batch([0, 1], failed=[0, 1]))
    merged(folder, 2)
    commit(folder, 2, 0, batch([0, 1]))
    assert [row["error"] for row in merged(folder, 2)] == [None, None]
    assert errors(folder) == []
    assert len(objects(folder.path / "timing.jsonl")) == 2


def test_output_that_lacks_what_was_recorded_later_does_not_count_and_ends_with_the_next_merge(tmp_path: Path) -> None:
    folder = made(tmp_path, 3)
    commit(folder, 1, 0, batch([0, 1, 2], failed=[1]))
    assert not folder.merged()
    for name in ("generations.jsonl", "generations.arrow"):
        merge_with(write_lines, folder, 3, name)
    assert folder.merged()
    assert {path.name for path in folder.path.glob("generations.*")} == {"generations.jsonl", "generations.arrow"}
    commit(folder, 2, 0, batch([1]))
    assert not folder.merged()
    assert status(folder).exit_code == 75
    merge_with(write_lines, folder, 3, "generations.parquet")
    assert folder.merged()
    assert status(folder).exit_code == 0
    assert {path.name for path in folder.path.glob("generations.*")} == {"generations.parquet"}
    (folder.path / "generations.parquet").unlink()
    assert not folder.merged()


def test_timing_has_a_line_a_batch_with_these_fields(tmp_path: Path) -> None:
    folder = made(tmp_path, 6)
    commit(folder, 1, 0, batch([0, 2]), batch([4], failed=[4]))
    commit(folder, 1, 1, batch([1, 3, 5]))
    merged(folder, 6)
    lines = objects(folder.path / "timing.jsonl")
    assert [line["prompts"] for line in lines] == [2, 1, 3]
    assert [(line["attempt"], line["rank"], line["first"]) for line in lines] == [
        (1, 0, True),
        (1, 0, False),
        (1, 1, True),
    ]
    assert list(lines[0]) == [
        "seconds",
        "prompts",
        "prompt_tokens",
        "generated_tokens",
        "padded_tokens",
        "tokens_per_second",
        "peak_memory_bytes",
        "attempt",
        "rank",
        "first",
        "finished",
        "share_of_bound",
        "reasoning_tokens",
    ]
    finished = lines[0].pop("finished")
    assert isinstance(finished, float)
    assert lines[0] == {
        "seconds": 0.5,
        "prompts": 2,
        "prompt_tokens": 6,
        "generated_tokens": 4,
        "padded_tokens": 1,
        "tokens_per_second": 8.0,
        "peak_memory_bytes": 9,
        "attempt": 1,
        "rank": 0,
        "first": True,
        "share_of_bound": None,
        "reasoning_tokens": 0,
    }


def test_a_row_beyond_the_input_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path, 9)
    commit(folder, 1, 0, batch([0, 5]))
    with pytest.raises(CheckpointError, match="holds row 5"):
        merged(folder, 3)


def test_no_room_for_the_output_keeps_the_old_one_and_says_what_to_do(tmp_path: Path) -> None:
    folder = made(tmp_path, 50)
    commit(folder, 1, 0, batch([0]))
    merged(folder, 50)
    commit(folder, 1, 1, batch(range(1, 50)))
    code = """
import resource, sys
from pathlib import Path
from batchgen.checkpoint import CheckpointError, RunFolder, merge_with, write_lines
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    merge_with(write_lines, RunFolder(Path(sys.argv[1])), 50, "generations.jsonl")
except CheckpointError as error:
    print(error)
"""
    sentence = output(start(code, folder.path))
    assert f"cannot write {folder.path / 'generations.jsonl'}: File too large." in sentence
    assert f"batchgen merge {folder.path}" in sentence
    assert [row["index"] for row in objects(folder.path / "generations.jsonl")] == [0]
    assert not [entry for entry in folder.path.iterdir() if entry.name.startswith(".")]
    assert len(merged(folder, 50)) == 50
