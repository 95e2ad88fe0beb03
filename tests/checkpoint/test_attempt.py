"""Claims and heartbeats: who may work on a run folder, when processes die, hosts differ and ids are used again.

Another host is this one under another name: the claim is a file, and its `host` is edited.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from batchgen.checkpoint import (
    Attempt,
    CheckpointError,
    Heartbeat,
    RunFolder,
    attempts,
    check_free,
    claim,
    join,
    status,
)
from batchgen.types import Shard
from batchgen.world import World
from tests.checkpoint.folders import ALONE, died, edit, elsewhere, made, start

BEAT = 0.05  # seconds; 18 of them are the limit

CLAIM = """
import sys, time
from pathlib import Path
from batchgen.checkpoint import CheckpointError, Heartbeat, RunFolder, claim
from batchgen.world import World
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
try:
    attempt = claim(RunFolder(Path(sys.argv[1])), World(launch="L"), {}, 0.05)
except CheckpointError as error:
    print("refused", error, flush=True)
else:
    with Heartbeat(attempt, 0, lambda: {"state": "running", "generated_tokens": 7}):
        print("claimed", attempt.number, flush=True)
        sys.stdin.read()
"""


def starter(folder: RunFolder, at: float = 0.0) -> subprocess.Popen[str]:
    """A process that claims the folder, if it may, and works until it is killed or its standard input is closed."""
    return start(CLAIM, folder.path, at)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def until(condition: Callable[[], bool]) -> None:
    patience = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < patience
        time.sleep(0.01)


def running() -> Mapping[str, object]:
    return {"state": "running"}


def test_of_several_starts_at_once_exactly_one_works_and_a_killed_one_is_followed_at_once(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    for number in (1, 2):
        processes = [starter(folder, time.time() + 0.5) for _ in range(4)]
        lines = [said(process) for process in processes]
        assert sorted(lines)[0] == f"claimed {number}"
        refused = sorted(lines)[1:]
        assert all(f"in use: attempt {number}, process" in line for line in refused)
        assert all("or choose another folder with -o" in line for line in refused)
        processes[lines.index(f"claimed {number}")].kill()
        for process in processes:
            process.communicate()
    assert claim(folder, ALONE, {}, BEAT).number == 3
    assert len(list(folder.attempts.glob("0000?.json"))) == 3


def test_a_zombie_works_no_more(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    process = starter(folder)
    assert said(process) == "claimed 1"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has taken note
    assert Path(f"/proc/{process.pid}/stat").exists()
    assert len(check_free(folder, ALONE)) == 1
    process.communicate()


def test_a_stopped_process_still_holds_the_folder(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    process = starter(folder)
    said(process)
    subprocess.run(["kill", "-STOP", str(process.pid)], check=True)
    with pytest.raises(CheckpointError, match=f"process {process.pid} on .* works on it"):
        check_free(folder, ALONE)
    process.kill()
    process.communicate()


def test_a_reused_process_id_is_not_taken_for_the_attempt(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    attempt = claim(folder, ALONE, {}, BEAT)
    with pytest.raises(CheckpointError, match="in use"):
        check_free(folder, ALONE)
    edit(attempt.path, process_started=attempt.claim["process_started"] - 1)
    assert claim(folder, ALONE, {}, BEAT).number == 2


def test_a_rank_that_outlives_its_starter_holds_the_folder(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    attempt = died(folder)
    state = "running"
    with Heartbeat(attempt, 1, lambda: {"state": state}):
        with pytest.raises(CheckpointError, match="in use"):
            check_free(folder, ALONE)
        state = "finished"
    check_free(folder, ALONE)


def test_an_ended_attempt_holds_nothing_although_its_process_lives(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    attempt = claim(folder, ALONE, {"ranks": 2}, BEAT)
    attempt.end("finished")
    assert [one.ended for one in check_free(folder, ALONE)] == ["finished"]
    again = claim(folder, ALONE, {}, BEAT)
    assert (again.number, again.ended) == (2, None)
    assert attempts(folder)[0].claim["ranks"] == 2


def test_an_attempt_of_another_host_is_refused_while_its_heartbeat_moves(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    attempt = died(folder)
    elsewhere(attempt)
    with (
        Heartbeat(attempt, 0, lambda: {"state": "running", "host": "elsewhere"}),
        pytest.raises(CheckpointError, match=r"process .* on elsewhere works on it"),
    ):
        claim(folder, ALONE, {}, BEAT)


def test_a_silent_attempt_of_another_host_is_taken_over_after_one_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(tmp_path, 1)
    elsewhere(died(folder))
    checked = check_free(folder, ALONE)
    assert claim(folder, ALONE, {}, BEAT, checked).number == 2
    assert caplog.text.count("on elsewhere may still work; watching heartbeats for up to 1 s") == 1


def test_a_check_that_is_out_of_date_lets_nobody_in(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    died(folder)
    checked = check_free(folder, ALONE)
    claim(folder, ALONE, {}, BEAT)
    with pytest.raises(CheckpointError, match="in use: attempt 2"):
        claim(folder, ALONE, {}, BEAT, checked)


def test_an_attempt_of_another_host_that_ends_meanwhile_is_followed(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    attempt = died(folder)
    edit(attempt.path, host="elsewhere", heartbeat_seconds=20.0)  # a limit that the test would not wait out
    timer = threading.Timer(0.2, attempt.end, ["finished"])
    timer.start()
    assert check_free(folder, ALONE)[0].number == 1
    timer.join()


@pytest.mark.parametrize("changed", ["host", "boot", "namespace"])
def test_a_process_id_counts_only_on_its_own_host_boot_and_namespace(tmp_path: Path, changed: str) -> None:
    folder = made(tmp_path, 1)
    attempt = claim(folder, ALONE, {}, BEAT)
    assert attempt.is_here() is True
    edit(attempt.path, **{changed: "another"})
    assert attempts(folder)[0].is_here() is None


def test_the_same_job_started_again_takes_over_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = made(tmp_path, 1)
    elsewhere(died(folder, World(job="7", restarts=1)))
    assert claim(folder, World(job="7", restarts=2), {}, BEAT).number == 2
    assert caplog.text == ""


@pytest.mark.parametrize("world", [World(job="7", restarts=1), World(job="8", restarts=2), World(restarts=2)])
def test_another_job_or_the_same_start_of_it_watches_the_heartbeat(
    tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(tmp_path, 1)
    elsewhere(died(folder, World(job="7" if world.job else "", restarts=1)))
    assert claim(folder, world, {}, BEAT).number == 2
    assert "watching heartbeats" in caplog.text


def rank(number: int, launch: str = "L", size: int = 2) -> World:
    return World(rank=number, local_rank=number, size=size, local_size=size, launch=launch)


def test_a_rank_waits_for_the_attempt_of_its_launch(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    attempt = died(folder, rank(0), ranks=2)  # of an earlier start on the same port
    found: list[Attempt] = []
    waiting = threading.Thread(target=lambda: found.append(join(folder, rank(1))))
    waiting.start()
    time.sleep(0.3)
    assert not found
    process = starter(folder)
    said(process)
    waiting.join(30)
    assert [one.number for one in found] == [attempt.number + 1]
    process.communicate()


@pytest.mark.parametrize("launch", ["", "another"])
def test_a_rank_joins_no_attempt_of_another_launch(tmp_path: Path, launch: str) -> None:
    folder = made(tmp_path, 1)
    claim(folder, rank(0), {}, BEAT)
    with pytest.raises(CheckpointError, match=r"rank 1 waited 0 s for rank 0 to claim .*look into rank 0's log"):
        join(folder, rank(1, launch), patience=0.3)


def test_a_rank_joins_an_attempt_that_rank_0_has_left_already(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    attempt = died(folder, rank(0))
    edit(folder.attempts / "00001-00000.json", state="finished")
    assert attempt.seems_live(rank(1)) is False
    assert join(folder, rank(1), patience=5).number == 1
    elsewhere(attempt)
    assert join(folder, rank(1), patience=5).number == 1


def test_a_rank_joins_no_attempt_that_has_a_heartbeat_of_its_own_rank(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    died(folder, rank(0), ranks=2)
    edit(folder.attempts / "00001-00000.json", state="finished")
    with pytest.raises(CheckpointError, match="waited"):
        join(folder, rank(1), patience=0.3)


def test_a_rank_with_the_number_of_its_attempt_does_not_wait(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    claim(folder, ALONE, {}, BEAT)
    world = World(rank=1, local_rank=1, size=2, local_size=2, attempt=1)
    assert join(folder, world, patience=0).number == 1


def test_a_rank_may_come_before_the_run_folder_exists(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="waited"):
        join(RunFolder(tmp_path / "none"), rank(1), patience=0.3)


def test_the_heartbeat_moves_during_a_long_batch(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    attempt = claim(folder, ALONE, {}, BEAT)
    with Heartbeat(attempt, 3, lambda: {"state": "running", "generated_tokens": 5}):
        until(lambda: attempt.heartbeats()[3]["beat"] > 3)  # nobody but its own thread beats
    last = attempt.heartbeats()
    time.sleep(3 * BEAT)
    assert attempt.heartbeats() == last
    assert last[3]["generated_tokens"] == 5
    assert last[3]["pid"] == os.getpid()


def test_a_heartbeat_that_cannot_be_written_only_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = made(tmp_path, 1)
    attempt = claim(folder, ALONE, {}, BEAT)
    with Heartbeat(attempt, 0, running):
        shutil.rmtree(folder.attempts)
        until(lambda: "cannot write the heartbeat" in caplog.text)
        folder.attempts.mkdir()
        until(lambda: bool(attempt.heartbeats()))


def test_a_heartbeat_on_a_full_disk_only_warns(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    code = """
import resource, sys
from pathlib import Path
from batchgen.checkpoint import Heartbeat, RunFolder, claim
from batchgen.world import World
attempt = claim(RunFolder(Path(sys.argv[1])), World(), {}, 0.05)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
with Heartbeat(attempt, 0, lambda: {"state": "running"}):
    print("works")
print(sorted(path.name for path in attempt.folder.attempts.iterdir()))
"""
    process = start(code, folder.path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "works\n['00001.json']\n")
    assert "cannot write the heartbeat" in err
    assert "File too large" in err


def test_a_damaged_heartbeat_is_left_out(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    attempt = claim(folder, ALONE, {}, BEAT)
    Heartbeat(attempt, 2, running).write()
    for name, content in {"0": b"", "1": b"3", "x": b"{}"}.items():
        (folder.attempts / f"00001-{name}.json").write_bytes(content)
    assert list(attempt.heartbeats()) == [2]


def test_status_never_fails_while_heartbeats_and_claims_are_replaced(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    attempt = claim(folder, ALONE, {}, 0.0005)
    over = threading.Event()

    def end_again_and_again() -> None:
        while not over.is_set():
            attempt.end("finished")

    thread = threading.Thread(target=end_again_and_again)
    thread.start()
    with Heartbeat(attempt, 0, running), Heartbeat(attempt, 1, running):
        seen = [status(folder).attempts[0].ranks for _ in range(300)]
    over.set()
    thread.join()
    assert set(seen) == {2}


def test_shards_are_claimed_side_by_side_and_nobody_gets_rows_that_another_has(tmp_path: Path) -> None:
    folder = made(tmp_path, 8)
    for index in range(4):
        assert claim(folder, ALONE, {}, BEAT, shard=Shard(index, 4)).number == index + 1
    for shard in (Shard(2, 4), Shard(0, 2), Shard(6, 8), Shard(0, 1), Shard(1, 3)):
        with pytest.raises(CheckpointError, match=r"in use: attempt \d, process \d+ on .*, shard \d/4 works on it"):
            claim(folder, ALONE, {}, BEAT, shard=shard)
    attempts(folder)[2].end("stopped")
    assert claim(folder, ALONE, {}, BEAT, shard=Shard(6, 8)).number == 5
    with pytest.raises(CheckpointError, match=r"attempt 5, .*, shard 6/8 works on it"):
        claim(folder, ALONE, {}, BEAT, shard=Shard(2, 4))


def test_many_silent_attempts_elsewhere_are_watched_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = made(tmp_path, 8)
    for index in range(8):
        elsewhere(claim(folder, ALONE, {}, BEAT, shard=Shard(index, 8)))
    assert claim(folder, ALONE, {}, BEAT).number == 9
    assert caplog.text.count("and 7 more may still work; watching heartbeats") == 1


def test_a_rank_finds_its_launch_among_the_other_tasks_of_an_array(tmp_path: Path) -> None:
    folder = made(tmp_path, 8)
    for index in range(4):
        claim(folder, rank(0, launch=f"task {index}"), {}, BEAT, shard=Shard(index, 4))
    found = join(folder, rank(1, launch="task 1"), patience=5)
    assert (found.number, found.shard) == (2, Shard(1, 4))
