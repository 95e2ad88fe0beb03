"""The run folder: commit order, torn and damaged files, what is done, what was asked."""

from __future__ import annotations

import json
import os
import random
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest

from batchgen.checkpoint import CheckpointError, DifferentRun, RunFolder, Writer
from batchgen.types import Batch
from tests.checkpoint.folders import batch, commit, generation, good_rows, made, output, render, start


def test_generations_are_on_the_disk_before_their_record_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path, 4)
    calls: list[tuple[str, str]] = []
    write, fsync = os.write, os.fsync

    def name(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.partition("-")[0]

    def noted_write(descriptor: int, data: bytes) -> int:
        calls.append(("write", name(descriptor)))
        return write(descriptor, data)

    def noted_sync(descriptor: int) -> None:
        calls.append(("sync", name(descriptor)))
        fsync(descriptor)

    writer = Writer(folder.path, 1, 0, 0, render)
    monkeypatch.setattr(os, "write", noted_write)
    monkeypatch.setattr(os, "fsync", noted_sync)
    writer.commit(batch([0, 1]), 1.0)
    writer.commit(batch([2]), 1.0)
    writer.close()
    once = [("write", "generations"), ("sync", "generations"), ("write", "batches"), ("sync", "batches")]
    assert calls == [("sync", "run"), *once, *once]


def test_a_record_says_what_its_batch_took(tmp_path: Path) -> None:
    folder = made(tmp_path, 5)
    generations, _ = commit(folder, 3, 1, batch([4, 0, 2], failed=[2]), batch([1]))
    (path, first), (_, second) = folder.records(verify=True)
    text = generations.read_bytes()
    assert path == generations
    assert (first.seconds, first.prompts, first.prompt_tokens, first.generated_tokens) == (0.5, 3, 9, 4)
    assert (first.padded_tokens, first.tokens_per_second, first.peak_memory_bytes) == (1, 8.0, 9)
    assert (first.attempt, first.rank, first.first, second.first) == (3, 1, True, False)
    assert (first.rows, first.failed) == ([4, 0, 2], [2])
    assert (first.begin, first.end, second.begin, second.end) == (0, first.end, first.end, len(text))
    assert first.checksum == zlib.crc32(text[: first.end])
    assert [json.loads(line)["index"] for line in text.splitlines()] == [4, 0, 2, 1]


def test_a_batch_in_no_time_has_no_rate(tmp_path: Path) -> None:
    writer = Writer(made(tmp_path, 1).path, 1, 0, 0, render)
    assert writer.commit(batch([0]), 0.0).tokens_per_second == 0.0
    writer.close()


def test_a_record_cut_at_any_byte_opens_its_rows_and_no_others(tmp_path: Path) -> None:
    folder = made(tmp_path, 6)
    _, batches = commit(folder, 1, 0, batch([0, 1]), batch([2, 3]), batch([4, 5]))
    whole = batches.read_bytes()
    for end in range(whole.rindex(b"\n", 0, -1) + 1, len(whole)):
        batches.write_bytes(whole[:end])
        assert good_rows(folder, 6) == {0, 1, 2, 3}


def test_generations_cut_at_any_byte_open_the_rows_of_their_batches_and_no_others(tmp_path: Path) -> None:
    folder = made(tmp_path, 6)
    generations, _ = commit(folder, 1, 0, batch([0, 1]), batch([2, 3]), batch([4, 5]))
    ends = [record.end for _, record in folder.records(verify=False)]
    whole = generations.read_bytes()
    for end in range(len(whole)):
        generations.write_bytes(whole[:end])
        for verify in (True, False):
            done = folder.done(6, verify=verify)
            assert done.good == 2 * sum(last <= end for last in ends)
            assert done.batches == sum(last <= end for last in ends)


def test_a_kill_at_any_moment_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from batchgen.checkpoint import RunFolder, Writer
from tests.checkpoint.folders import batch, render
writer = Writer(Path(sys.argv[1]), int(sys.argv[2]), 0, 0, render)
for row in range(0, 100_000, 10):
    writer.commit(batch(range(row, row + 10), "x" * 3000), 1.0)
    print(row, flush=True)
"""
    for attempt in range(1, 5):
        folder = made(tmp_path / str(attempt), 100_000)
        process = start(code, folder.path, attempt)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.random() / 10)
        process.kill()
        # Not communicate(), which passes over what readline() has read ahead.
        committed = 10 * (1 + len(process.stdout.readlines()))
        process.communicate()
        good = good_rows(folder, 100_000)
        assert good == set(range(len(good)))
        assert committed <= len(good) <= committed + 10


def test_a_write_that_fails_half_way_loses_that_batch_alone(tmp_path: Path) -> None:
    folder = made(tmp_path, 40)
    code = """
import resource, sys
from pathlib import Path
from batchgen.checkpoint import RunFolder, Writer
from tests.checkpoint.folders import batch, render
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
writer = Writer(Path(sys.argv[1]), 1, 0, 0, render)
for row in range(0, 40, 10):
    try:
        writer.commit(batch(range(row, row + 10)), 1.0)
    except OSError as error:
        print(row, writer.broken, error.strerror)
        break
"""
    row, broken, reason = output(start(code, folder.path)).split(maxsplit=2)
    assert (broken, reason) == ("True", "File too large\n")
    assert (folder.path / "generations-00001-00000.jsonl").stat().st_size == 4000
    assert good_rows(folder, 40) == set(range(int(row)))


def test_a_second_writer_never_touches_the_files_of_the_first(tmp_path: Path) -> None:
    folder = made(tmp_path, 2)
    generations, _ = commit(folder, 1, 0, batch([0]))
    before = generations.read_bytes()
    with pytest.raises(FileExistsError):
        commit(folder, 1, 0, batch([1]))
    assert generations.read_bytes() == before


def test_a_flipped_byte_in_the_generations_opens_the_rows_of_its_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(tmp_path, 6)
    generations, _ = commit(folder, 1, 0, batch([0, 1]), batch([2, 3]), batch([4, 5]))
    begins = [record.begin for _, record in folder.records(verify=False)]
    content = bytearray(generations.read_bytes())
    content[begins[1] + 5] ^= 1
    generations.write_bytes(content)
    assert good_rows(folder, 6) == {0, 1, 4, 5}
    assert f"is damaged at byte {begins[1]}; those rows are open again" in caplog.text


def test_a_wrong_digit_in_a_record_opens_its_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = made(tmp_path, 9)
    _, batches = commit(folder, 1, 0, batch([0, 1]), batch([2, 3]))
    batches.write_bytes(batches.read_bytes().replace(b'"rows":[2,3]', b'"rows":[2,7]'))
    assert good_rows(folder, 9) == {0, 1}
    assert f"{batches} line 2 is damaged" in caplog.text


def test_generations_that_were_deleted_are_open_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = made(tmp_path, 4)
    generations, _ = commit(folder, 1, 0, batch([0, 1]))
    commit(folder, 1, 1, batch([2, 3]))
    generations.unlink()
    assert good_rows(folder, 4) == {2, 3}
    assert f"{generations} is gone; the rows it held are open again" in caplog.text


def test_a_torn_tail_is_no_cause_for_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = made(tmp_path, 4)
    generations, batches = commit(folder, 1, 0, batch([0, 1]), batch([2, 3]))
    batches.write_bytes(batches.read_bytes()[:-1])
    with open(generations, "ab") as file:
        file.write(b'{"id": "torn')
    assert good_rows(folder, 4) == {0, 1}
    assert caplog.text == ""


def test_a_commit_while_the_records_are_read_is_not_taken_for_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(tmp_path, 200_000)
    writer = Writer(folder.path, 1, 0, 0, render)
    writer.commit(batch(range(100)), 1.0)
    # More than a read buffer of records, so that the reader comes back to the file for the later ones.
    for row in range(100, 20_000, 100):
        writer.commit(batch(range(row, row + 100)), 1.0)
    records = folder.records(verify=True)
    found = [next(records)[1]]
    writer.commit(batch(range(20_000, 20_100)), 1.0)
    writer.close()
    found += [record for _, record in records]
    assert [record.rows[0] for record in found] == list(range(0, 20_100, 100))
    assert caplog.text == ""


def test_a_field_of_a_later_version_is_passed_over(tmp_path: Path) -> None:
    folder = made(tmp_path, 2)
    _, batches = commit(folder, 1, 0, batch([0, 1]))
    body = batches.read_bytes().rpartition(b',"seal":')[0] + b',"joules":3.5'
    batches.write_bytes(b'%b,"seal":%d}\n' % (body, zlib.crc32(body)))
    assert good_rows(folder, 2) == {0, 1}


def test_a_record_without_a_field_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = made(tmp_path, 2)
    _, batches = commit(folder, 1, 0, batch([0, 1]))
    body = batches.read_bytes().rpartition(b',"seal":')[0].replace(b'"padded_tokens":1,', b"")
    batches.write_bytes(b'%b,"seal":%d}\n' % (body, zlib.crc32(body)))
    assert good_rows(folder, 2) == set()
    assert "line 1 is damaged" in caplog.text


def test_success_wins_over_failure_in_either_order(tmp_path: Path) -> None:
    folder = made(tmp_path, 4)
    commit(folder, 1, 0, batch([0, 1, 2], failed=[1, 2]))
    commit(folder, 2, 0, batch([0, 1, 2], failed=[0, 2]))
    done = folder.done(4)
    assert (done.good, done.failed, done.open) == (2, 1, 1)
    assert [done.is_good(row) for row in range(4)] == [True, True, False, False]
    assert [done.is_failed(row) for row in range(4)] == [False, False, True, False]


def test_tokens_are_counted_by_attempt(tmp_path: Path) -> None:
    folder = made(tmp_path, 4)
    commit(folder, 1, 0, batch([0]), batch([1]))
    commit(folder, 1, 1, batch([2]))
    commit(folder, 2, 0, batch([3]))
    done = folder.done(4)
    assert done.attempt_tokens == {1: 6, 2: 2}
    assert (done.prompt_tokens, done.generated_tokens, done.batches) == (12, 8, 4)


def test_a_row_beyond_the_input_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path, 3)
    commit(folder, 1, 0, batch([0, 3]))
    with pytest.raises(CheckpointError, match=r"generations-00001-00000\.jsonl holds row 3, .*another run"):
        folder.done(3)


def test_what_is_done_takes_a_byte_a_row(tmp_path: Path) -> None:
    rows = 1_000_000
    folder = made(tmp_path, rows)
    writer = Writer(folder.path, 1, 0, 0, lambda _: b"{}\n")
    one = generation(0)
    for begin in range(0, rows, 10_000):
        writer.commit(Batch([one] * 10_000), 1.0)
        one.index = begin
    writer.close()
    tracemalloc.start()
    done = folder.done(rows)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(done.states) == rows
    assert kept < 1.1 * rows
    assert peak < 8 * rows


def test_the_same_run_is_taken_up_and_a_changed_one_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.make()
    asked = {"rows": 2, "model": "m", "stop": ("a",), "template": None}
    folder.check_or_create(asked, {"ranks": 1})
    created = folder.created
    folder.check_or_create(asked, {"ranks": 8})
    folder.check_or_create({"rows": 2, "model": "m", "stop": ["a"], "template": None, "later": None}, {})
    assert folder.read_identity()["model"] == "m"
    assert json.loads((folder.path / "run.json").read_text())["first_start"] == {"ranks": 1}
    with pytest.raises(DifferentRun) as caught:
        folder.check_or_create({"rows": 2, "model": "n", "stop": ("a",), "template": "x" * 500, "dtype": "nf4"}, {})
    text = str(caught.value)
    assert 'model was "m", now "n"' in text
    assert 'template was null, now "xxx' in text
    assert 'dtype was not set, now "nf4"' in text
    assert "rows" not in text
    assert "stop" not in text
    assert "new run with another -o" in text
    assert len(text) < 500
    assert folder.created == created


def test_of_several_adapters_those_that_differ_are_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.make()
    adapters = {"sql": "sha256:" + "1" * 64, "law": "sha256:" + "2" * 64}
    folder.check_or_create({"rows": 2, "adapters": adapters}, {})
    folder.check_or_create({"rows": 2, "adapters": dict(reversed(adapters.items()))}, {})
    with pytest.raises(DifferentRun, match=r'differently: adapters\.law was "sha256:22+", now not set\. Start'):
        folder.check_or_create({"rows": 2, "adapters": {"sql": adapters["sql"]}}, {})
    with pytest.raises(DifferentRun, match=r'differently: adapters\.law was "sha256:22+", now "sha256:33+"\. Start'):
        folder.check_or_create({"rows": 2, "adapters": adapters | {"law": "sha256:" + "3" * 64}}, {})
    with pytest.raises(DifferentRun, match=r"adapters\.sql was .*, now not set; adapters\.law was .*, now not set\. S"):
        folder.check_or_create({"rows": 2}, {})


def test_of_several_first_starts_one_decides_what_was_asked(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from batchgen.checkpoint import DifferentRun, RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.make()
try:
    folder.check_or_create({"rows": 1, "model": sys.argv[2]}, {})
    print("mine")
except DifferentRun:
    print("theirs")
"""
    processes = [start(code, tmp_path / "run", name) for name in "abcd"]
    said = [output(process) for process in processes]
    assert sorted(said) == ["mine\n", "theirs\n", "theirs\n", "theirs\n"]
    assert RunFolder(tmp_path / "run").read_identity()["model"] == "abcd"[said.index("mine\n")]


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match=r"/file is a file, not a folder\. Choose another folder with -o"):
            RunFolder(place).make()


def test_no_room_for_the_first_file_is_a_sentence(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from batchgen.checkpoint import CheckpointError, RunFolder, claim
from batchgen.world import World
folder = RunFolder(Path(sys.argv[1]))
folder.make()
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
for write in (lambda: folder.check_or_create({"rows": 1}, {}), lambda: claim(folder, World(), {}, 5.0)):
    try:
        write()
    except CheckpointError as error:
        print(error)
"""
    path = tmp_path / "run"
    sentence = f"cannot write the run folder {path}: File too large. Make room, or choose another with -o\n"
    assert output(start(code, path)) == 2 * sentence


@pytest.mark.parametrize("content", ['{"created": 1}', '{"asked": 3}', '{"asked": {"rows": "many"}}'])
def test_a_run_file_that_does_not_say_what_was_asked_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        RunFolder(tmp_path).read_identity()
