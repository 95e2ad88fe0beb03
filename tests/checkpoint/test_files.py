"""Files that a crash cannot tear: real processes that race, real limits that make writes fail."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from batchgen.checkpoint import CheckpointError, read_json
from batchgen.checkpoint.files import append, make_exclusive
from batchgen.files import sync_folder, write_atomic
from tests.checkpoint.folders import output, start

RACE = """
import sys, time
from pathlib import Path
from batchgen.checkpoint.files import make_exclusive
folder, who, begin = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
time.sleep(max(0.0, begin - time.time()))
print([n for n in range(40) if make_exclusive(folder / str(n), who.encode() * 100_000)])
"""


def test_of_several_processes_exactly_one_makes_a_file_and_no_reader_sees_a_part_of_it(tmp_path: Path) -> None:
    processes = [start(RACE, tmp_path, who, time.time() + 0.5) for who in "abcd"]
    lengths = set()
    while any(process.poll() is None for process in processes):
        lengths |= {len(path.read_bytes()) for path in tmp_path.glob("[0-9]*")}
    assert lengths == {100_000}
    won = [json.loads(output(process)) for process in processes]
    assert sorted(number for numbers in won for number in numbers) == list(range(40))
    for who, numbers in zip("abcd", won, strict=True):
        assert all(set((tmp_path / str(number)).read_text()) == {who} for number in numbers)
    assert len(list(tmp_path.iterdir())) == 40  # no scratch file is left


def test_a_link_whose_answer_is_lost_on_the_network_counts_as_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def asked_twice(source: Path, target: Path) -> None:
        for _ in range(2):
            link(source, target)

    monkeypatch.setattr(os, "link", asked_twice)
    assert make_exclusive(tmp_path / "claim", b"mine")
    assert not make_exclusive(tmp_path / "claim", b"another's")
    assert (tmp_path / "claim").read_bytes() == b"mine"


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 1000 bytes: what is written up to there is written, the rest fails.

    Not a fixture: pytest writes its own log, perhaps into a file, while a fixture still holds.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_write_leaves_the_old_file_and_no_scratch(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with full_disk(), pytest.raises(OSError, match="too large"):
        write_atomic(path, bytes(5000))
    with full_disk(), pytest.raises(OSError, match="too large"):
        make_exclusive(tmp_path / "other", bytes(5000))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_append_goes_on_after_a_partial_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    append(descriptor, b"0123456789" * 5)
    append(descriptor, b"end")
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"0123456789" * 5 + b"end"


def test_a_file_system_that_cannot_sync_a_folder_is_no_error() -> None:
    descriptor = os.open("/proc/self", os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(descriptor)
    os.close(descriptor)
    sync_folder(Path("/proc/self"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "is not a run folder: it has no run.json"),
        (b"", r"run\.json is damaged"),
        (b'{"a": ', r"run\.json is damaged"),
        (b"[1]", r"run\.json is damaged: it holds no object"),
    ],
)
def test_what_is_wrong_with_a_json_file_is_said(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence):
        read_json(path)


def test_a_json_file_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*run\.json: Is a directory"):
        read_json(tmp_path / "run.json")
