"""Files of a run folder that were cut, deleted or changed at rest: the same command goes on, or says what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from batchgen import Host, RunSettings, Status, run
from batchgen.checkpoint import CheckpointError, RunFolder, attempts, check_free, claim
from tests.checkpoint.folders import ALONE, batch, commit, died, made
from tests.commands.starts import ENVIRONMENT, prompts, read_rows, write_rows

BEAT = 0.05


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    "change",
    [
        cut,
        lambda content: b"",
        lambda content: content.replace(b'"shard": "0/1"', b'"shard": "2/1"'),
        lambda content: content.replace(b'"heartbeat_seconds": 0.05', b'"heartbeat_seconds": "0x05"'),
        lambda content: content.replace(b'"process_started"', b'"process_stbrted"').replace(
            b'"restarts": 0', b'"restarts": []'
        ),
    ],
    ids=["cut", "empty", "no shard", "no number", "wrong type"],
)
def test_a_dead_attempt_whose_claim_is_damaged_is_followed_at_once(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    folder = made(tmp_path, 1)
    dead = died(folder)
    changed = change(dead.path.read_bytes())
    assert changed != dead.path.read_bytes()
    dead.path.write_bytes(changed)
    assert claim(folder, ALONE, {}, BEAT).number == 2


def test_an_attempt_whose_claim_is_damaged_holds_the_folder_while_it_lives(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    dead = died(folder)
    beat = folder.attempts / "00001-00000.json"
    mine = {
        "pid": os.getpid(),
        "process_started": int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]),
    }
    beat.write_text(json.dumps(json.loads(beat.read_text()) | mine))
    dead.path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is in use: attempt 1, whose claim is damaged"):
        check_free(folder, ALONE)


def test_a_heartbeat_of_wrong_types_is_left_out(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    attempt = died(folder, ranks=2)
    beat = folder.attempts / "00001-00001.json"
    for name in ("time", "generated_tokens", "ready", "pid"):
        beat.write_text(json.dumps(json.loads((folder.attempts / "00001-00000.json").read_text()) | {name: "5x"}))
        assert list(attempt.heartbeats()) == [0]


@pytest.mark.parametrize("names", ["attempts/*", "attempts/00001.json", "batches-*", "generations-*"])
def test_an_attempt_never_gets_the_number_of_an_earlier_one(tmp_path: Path, names: str) -> None:
    folder = made(tmp_path, 2)
    claim(folder, ALONE, {}, BEAT).end("stopped")
    commit(folder, 1, 0, batch([0]))
    for path in folder.path.glob(names):
        path.unlink()
    assert claim(folder, ALONE, {}, BEAT).number == 2
    assert [attempt.number for attempt in attempts(folder)] == [1, 2]


def test_work_without_the_file_that_says_whose_it_is_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path, 2)
    commit(folder, 1, 0, batch([0]))
    (folder.path / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"run holds generations, but no run\.json.*Restore it, or .*another -o"):
        folder.check_or_create({"rows": 2}, {})
    assert not (folder.path / "run.json").exists()


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return str(write_rows(tmp_path / "prompts.jsonl", [*prompts(9), {"id": "row-0", "prompt": "repeated"}]))


def echo(rows: str, out: Path) -> Status:
    return run(rows, out, RunSettings(engine="echo", batch_size=3), host=Host(ENVIRONMENT))


@pytest.mark.parametrize(
    "change", [cut, lambda content: b"[]", lambda content: content.replace(b'"9"', b'"8"')], ids=["cut", "type", "flip"]
)
def test_a_damaged_list_of_repeated_ids_is_made_again(
    tmp_path: Path, rows: str, change: Callable[[bytes], bytes]
) -> None:
    first = write_rows(
        tmp_path / "twice.jsonl", [*prompts(9), {**prompts(1)[0], "id": "a"}, {"id": "a", "prompt": "b"}]
    )
    assert echo(str(first), tmp_path / "out").failed == 1
    good = (tmp_path / "out" / "generations.jsonl").read_bytes()
    known = tmp_path / "out" / "input" / "duplicates.json"
    content = known.read_bytes()
    known.write_bytes(change(content.replace(b'"10"', b'"9"')))
    for path in (tmp_path / "out").glob("batches-*"):
        path.unlink()
    assert echo(str(first), tmp_path / "out").failed == 1
    assert (tmp_path / "out" / "generations.jsonl").read_bytes() == good
    assert known.read_bytes() == content


def test_timing_counts_no_batch_that_was_done_again(tmp_path: Path, rows: str) -> None:
    out = tmp_path / "out"
    echo(rows, out)
    generations = out / "generations-00001-00000.jsonl"
    generations.write_bytes(generations.read_bytes().replace(b'"index":', b'"jndex":', 1))
    echo(rows, out)
    assert sum(line["prompts"] for line in read_rows(out / "timing.jsonl")) == 10
    assert {line["attempt"] for line in read_rows(out / "timing.jsonl")} == {1, 2}


def test_a_start_that_leaves_damaged_rows_open_does_not_say_that_it_has_finished(tmp_path: Path, rows: str) -> None:
    out = tmp_path / "out"
    assert echo(rows, out).exit_code == 3
    generations = out / "generations-00001-00000.jsonl"
    generations.write_bytes(generations.read_bytes().replace(b'"index":', b'"jndex":'))
    # The bad row comes with the first batch, and is one too many.
    status = run(rows, out, RunSettings(engine="echo", batch_size=3, max_error_rate=0.0), host=Host(ENVIRONMENT))
    assert (status.exit_code, status.good, status.failed, status.open) == (75, 3, 1, 6)
    assert RunFolder(out).path.joinpath("generations.jsonl").exists()
