"""Runs that are stopped, killed or out of room: what they leave, and that the same command goes on from there."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.commands.starts import (
    Started,
    batchgen,
    call,
    echo,
    found,
    heartbeats,
    prompts,
    read_rows,
    recorded,
    slow_echo,
    until,
    write_rows,
)

ROWS = 150


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", prompts(ROWS))


@pytest.fixture
def unbroken(tmp_path: Path, rows: Path) -> bytes:
    assert call(tmp_path, *echo(rows, "-o", "unbroken")).code == 0
    return (tmp_path / "unbroken/generations.jsonl").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2], ids=lambda number: number.name)
def test_stopped_run_is_exit_75_and_the_same_command_finishes_it(
    tmp_path: Path, rows: Path, unbroken: bytes, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    with Started(batchgen(*slow_echo(rows, "-o", out)), tmp_path) as process:
        until(lambda: recorded(out), process)
        process.send(number)
        ended = process.end()
    assert (ended.code, ended.out) == (75, "")
    assert f"batchgen: stopped by {number.name}" in ended.err
    assert "The same command goes on from there" in ended.err
    assert "Traceback" not in ended.err
    first = found(out)
    assert 0 < first.good < ROWS
    assert (first.state, first.attempts[0].ended) == ("stopped", f"stopped by {number.name}")
    assert not (out / "generations.jsonl").exists()
    assert call(tmp_path, *slow_echo(rows, "-o", out)).code == 0
    assert (out / "generations.jsonl").read_bytes() == unbroken
    assert found(out).generated_tokens == sum(row["generated_tokens"] for row in read_rows(out / "generations.jsonl"))


def test_killed_run_is_taken_over_at_once_by_another_batch_size_and_ranks(
    tmp_path: Path, rows: Path, unbroken: bytes
) -> None:
    out = tmp_path / "out"
    with Started(batchgen(*slow_echo(rows, "-o", out)), tmp_path) as process:
        until(lambda: recorded(out), process)
        process.send(signal.SIGKILL)
        assert process.end().code == -signal.SIGKILL
    assert [attempt.ended for attempt in found(out).attempts] == [None]
    ended = call(tmp_path, *echo(rows, "-o", out), "--ranks", 2, "--batch-size", 7)
    assert ended.code == 0, ended.err
    assert "may still work" not in ended.err
    assert (out / "generations.jsonl").read_bytes() == unbroken


def test_second_interrupt_ends_at_once_and_is_resumable(tmp_path: Path, rows: Path, unbroken: bytes) -> None:
    out = tmp_path / "out"
    # One row takes longer than anybody waits.
    stuck = [*echo(rows, "-o", out), "--set", "seconds=1000", "--heartbeat-seconds", 0.1]
    with Started(batchgen(*stuck), tmp_path) as process:
        until(lambda: heartbeats(out).get(0, {}).get("steps") == 1, process)
        process.send(signal.SIGINT)
        # Two signals that wait together are one: the next is sent when the first has been heard.
        until(lambda: heartbeats(out)[0]["reason"], process)
        assert process.runs()
        process.send(signal.SIGINT)
        ended = process.end()
    assert ended.code == 75
    assert "batchgen: died. What is recorded is safe" in ended.err
    assert "Traceback" not in ended.err
    assert call(tmp_path, *echo(rows, "-o", out)).code == 0
    assert (out / "generations.jsonl").read_bytes() == unbroken


def test_folder_of_a_live_run_is_refused_and_the_run_not_disturbed(tmp_path: Path, rows: Path, unbroken: bytes) -> None:
    out = tmp_path / "out"
    with Started(batchgen(*slow_echo(rows, "-o", out)), tmp_path) as process:
        until(lambda: recorded(out), process)
        second = call(tmp_path, *echo(rows, "-o", out))
        assert process.runs()
        ended = process.end()
    assert (second.code, second.out) == (4, "")
    assert f"{out} is in use: attempt 1, process {process.pid}" in second.err
    assert ended.code == 0
    assert (out / "generations.jsonl").read_bytes() == unbroken


def test_signal_while_the_engine_and_the_model_are_prepared_stops_in_order(
    tmp_path: Path, rows: Path, tiny_llama: Path
) -> None:
    command = ["run", rows, "-o", "out", "--model", tiny_llama, "--dtype", "float32"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    with Started(batchgen(*command), tmp_path, environment) as process:
        until(lambda: process.catches(signal.SIGUSR2), process)
        process.send(signal.SIGUSR2)  # torch is not even imported
        ended = process.end()
    assert ended.code == 75, ended.err
    assert "stopped by SIGUSR2; 0 of 150 rows good, 0 failed, 150 open" in ended.err


def limit_files(size: int) -> None:
    """Lets no file grow beyond `size` bytes: like a full disk, for whoever writes one that large."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_run_that_cannot_write_any_more_stops_and_loses_nothing(tmp_path: Path, unbroken: bytes, rows: Path) -> None:
    command = [*echo(rows, "-o", "out"), "--batch-size", 5]
    ended = call(tmp_path, *command, before=partial(limit_files, 8000))
    assert (ended.code, ended.out) == (75, "")
    assert "cannot write to out: File too large" in ended.err
    assert "Nothing recorded is lost; make room, and the same command goes on from there" in ended.err
    assert "Traceback" not in ended.err
    state = found(tmp_path / "out")
    assert 0 < state.good < ROWS
    assert "cannot write to out" in str(state.attempts[0].ended)
    assert call(tmp_path, *command).code == 0
    assert (tmp_path / "out/generations.jsonl").read_bytes() == unbroken


def test_ranks_that_cannot_write_any_more_say_why_the_attempt_ended(tmp_path: Path, rows: Path) -> None:
    command = [*echo(rows, "-o", "out"), "--batch-size", 5, "--ranks", 2]
    ended = call(tmp_path, *command, before=partial(limit_files, 8000))
    assert ended.code == 75
    assert "batchgen: cannot write to out: File too large; " in ended.err
    assert ended.err.count("cannot write to out:") == 1
    assert "died" not in ended.err


def test_merge_without_room_is_exit_75_and_the_next_start_merges(tmp_path: Path, rows: Path, unbroken: bytes) -> None:
    size = len(unbroken) * 3 // 4  # enough for each of two ranks, not for the merged file
    ended = call(tmp_path, *echo(rows, "-o", "out"), "--ranks", 2, before=partial(limit_files, size))
    assert (ended.code, ended.out) == (75, "")
    assert "cannot write out/generations.jsonl: File too large. Every generation is safe" in ended.err
    assert "Traceback" not in ended.err
    assert "MergeError" in str(found(tmp_path / "out").attempts[0].ended)
    assert sorted(path.name for path in (tmp_path / "out").glob(".*")) == []
    assert call(tmp_path, *echo(rows, "-o", "out")).code == 0
    assert (tmp_path / "out/generations.jsonl").read_bytes() == unbroken
    assert found(tmp_path / "out").batches == 2


def test_unpacking_without_room_is_exit_4_and_a_sentence(tmp_path: Path, rows: Path, unbroken: bytes) -> None:
    subprocess.run(["gzip", rows], check=True)
    command = echo("prompts.jsonl.gz", "-o", "out")
    ended = call(tmp_path, *command, before=partial(limit_files, 4000))
    assert ended.code == 4
    assert "cannot unpack prompts.jsonl.gz into out/input: File too large. It needs room" in ended.err
    assert call(tmp_path, *command).code == 0
    assert (tmp_path / "out/generations.jsonl").read_bytes() == unbroken


DISK = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of `DISK` bytes. Where nobody may mount one, the limits of file size above have to do."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", disk]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def leave(disk: Path, free: int) -> Path:
    """Fills `disk` but for `free` bytes."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    room = os.statvfs(disk)
    ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - free))
    return ballast


def test_full_disk_stops_the_run_and_the_same_command_goes_on_when_there_is_room(
    tmp_path: Path, small_disk: Path, rows: Path, unbroken: bytes
) -> None:
    out = small_disk / "out"
    ballast = leave(small_disk, 60_000)
    command = [*echo(rows, "-o", out), "--batch-size", 5]
    ended = call(tmp_path, *command)
    assert ended.code == 75, ended.err
    assert f"cannot write to {out}: No space left on device" in ended.err
    assert "ake room" in ended.err  # whether or not there is room for the reason
    assert "Traceback" not in ended.err
    assert 0 < found(out).good < ROWS
    ballast.unlink()
    assert call(tmp_path, *command).code == 0
    assert (out / "generations.jsonl").read_bytes() == unbroken


def test_disk_that_is_full_at_any_step_of_a_start_is_a_sentence(
    tmp_path: Path, small_disk: Path, unbroken: bytes, rows: Path
) -> None:
    page = 4096
    codes = set()
    for free in range(10):
        leave(small_disk, free * page)
        ended = call(tmp_path, *echo(rows, "-o", small_disk / f"out-{free}"))
        assert "Traceback" not in ended.err
        assert "No space left on device" in ended.err
        codes.add(ended.code)
    assert codes == {4, 75}
    (small_disk / "ballast").unlink()
    for free in range(10):
        out = small_disk / f"out-{free}"
        assert call(tmp_path, *echo(rows, "-o", out)).code == 0
        assert (out / "generations.jsonl").read_bytes() == unbroken


def test_a_packed_input_that_has_changed_is_refused_and_the_text_that_others_read_stays(tmp_path: Path) -> None:
    def pack(letter: str) -> None:
        lines = "".join(json.dumps({"prompt": letter * 5 + str(number)}) + "\n" for number in range(100, 160))
        (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))

    pack("a")
    words = slow_echo("p.jsonl.gz", "-o", "out")
    with Started(batchgen(*words), tmp_path) as process:
        until(lambda: recorded(tmp_path / "out"), process)
        process.send(signal.SIGTERM)
        assert process.end().code == 75
    cache = {path.name: path.read_bytes() for path in (tmp_path / "out" / "input").iterdir()}
    pack("b")
    refused = call(tmp_path, *words)
    assert refused.code == 4
    assert "p.jsonl.gz is not what the run began with" in refused.err
    write_rows(tmp_path / "more.jsonl", [{"prompt": "c"}])
    pack("a")
    assert call(tmp_path, *slow_echo("more.jsonl", "p.jsonl.gz", "-o", "out")).code == 4
    assert {name: (tmp_path / "out" / "input" / name).read_bytes() for name in cache} == cache
    assert call(tmp_path, *words).code == 0
    assert {row["text"][:5] for row in read_rows(tmp_path / "out" / "generations.jsonl")} == {"aaaaa"}


def test_a_run_in_a_folder_of_ones_own_leaves_what_is_in_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "p.jsonl", prompts(3))
    own = {name: f"{name} is mine" for name in (".env", ".gitignore", ".nfs0001", "notes.txt")}
    for name, text in own.items():
        (tmp_path / name).write_text(text)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".generations.jsonl.node1.77.0123abcd").write_text("half")  # of a start that was killed
    assert call(tmp_path, *echo("p.jsonl", "-o", ".")).code == 0
    assert {name: (tmp_path / name).read_text() for name in own} == own
    assert (tmp_path / ".git").is_dir()
    assert not (tmp_path / ".generations.jsonl.node1.77.0123abcd").exists()


@pytest.mark.parametrize("name", ["errors.jsonl", "generations.jsonl", "generations.parquet", "timing.jsonl"])
def test_a_file_of_ones_own_with_the_name_of_an_output_is_not_replaced(name: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / name).write_text("mine\n")
    write_rows(tmp_path / "data.jsonl", prompts(3))
    ended = call(tmp_path, *echo("data.jsonl"))
    assert ended.code == 4
    assert f"data holds {name}, but no run.json" in ended.err
    assert [path.name for path in data.iterdir() if path.is_file()] == [name]
    assert (data / name).read_text() == "mine\n"


def test_a_pattern_that_names_an_output_is_refused_as_the_file_is(tmp_path: Path) -> None:
    write_rows(tmp_path / "generations.jsonl", prompts(3))
    ended = call(tmp_path, *echo("*.jsonl", "-o", "."))
    assert ended.code == 4
    assert "generations.jsonl is a file that the run in . writes" in ended.err
