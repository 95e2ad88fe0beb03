"""Whom the watchdog names, from heartbeats as real ranks write them; how a run ends in which somebody stands still."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from batchgen import checkpoint
from batchgen.checkpoint import Attempt, Heartbeat
from batchgen.runs.watchdog import FIRST_STEP_SECONDS, Still, culprits, progress
from tests.checkpoint import folders
from tests.commands.starts import Ended, Started, batchgen, call, found, heartbeats, prompts, step, until, write_rows

PATIENCE = 4.0  # s

# For sitecustomize: the rank STUCK comes to no end with its 20th row.
STUCK = """
import itertools, os
if os.environ.get("RANK", "0") == os.environ.get("STUCK"):
    from batchgen.engines import echo
    answer, calls = echo._echo, itertools.count()
    def walks_in_circles(prompt):
        while next(calls) >= 20:
            pass
        return answer(prompt)
    echo._echo = walks_in_circles
"""


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return checkpoint.claim(folders.made(tmp_path, 8), folders.ALONE, {}, 0.1)


def beat(attempt: Attempt, rank: int, steps: int, *, age: float = 0.0, state: str = "running") -> None:
    """One heartbeat of `rank`, written `age` seconds ago."""
    Heartbeat(attempt, rank, lambda: {"state": state, "steps": steps}).write()
    folders.edit(attempt.folder.attempts / f"{attempt.number:05d}-{rank:05d}.json", time=time.time() - age)


def test_the_rank_with_the_fewest_steps_is_named(attempt: Attempt) -> None:
    beat(attempt, 0, 31)
    beat(attempt, 1, 30)
    assert culprits(attempt, PATIENCE).startswith("rank 1 (process")
    assert culprits(attempt, PATIENCE).endswith("stopped answering at step 30")


def test_of_ranks_at_the_same_step_the_one_without_a_heartbeat_is_named(attempt: Attempt) -> None:
    # Frozen inside a forward, after all had agreed on it: the others have counted that step too.
    beat(attempt, 0, 30)
    beat(attempt, 1, 30, age=PATIENCE)
    beat(attempt, 2, 30)
    assert culprits(attempt, PATIENCE).startswith("rank 1 (process")
    assert "rank 0" not in culprits(attempt, PATIENCE)


def test_a_rank_without_a_heartbeat_is_named_before_a_slow_one(attempt: Attempt) -> None:
    # Its last heartbeat was written before its last steps, or after them: its count says little.
    beat(attempt, 0, 31)
    beat(attempt, 1, 32, age=PATIENCE)
    assert culprits(attempt, PATIENCE).startswith("rank 1 (process")


def test_ranks_that_all_live_are_in_the_same_collective(attempt: Attempt) -> None:
    beat(attempt, 0, 30)
    beat(attempt, 1, 30)
    said = culprits(attempt, PATIENCE)
    assert said == "all ranks stand at step 30 and their heartbeats move: they wait for each other inside it"


def test_ranks_that_have_ended_are_nobodys_culprits(attempt: Attempt) -> None:
    beat(attempt, 0, 30)
    beat(attempt, 1, 2, age=60.0, state="finished")
    assert "rank 1" not in culprits(attempt, PATIENCE)
    beat(attempt, 0, 30, state="finished")
    assert culprits(attempt, PATIENCE) == "no rank has a heartbeat"


def test_a_heartbeat_that_is_rarer_than_the_patience_says_nothing(tmp_path: Path) -> None:
    rare = checkpoint.claim(folders.made(tmp_path, 8), folders.ALONE, {}, 5.0)
    beat(rare, 0, 30, age=4.0)
    beat(rare, 1, 29)
    assert culprits(rare, PATIENCE).startswith("rank 1 (process")


def standing(seconds: Iterable[float], *, least: float = 100.0) -> Still:
    """What one has seen whose looks were this many seconds apart; a step is made between any two of them."""
    still = Still(least, 1e6)
    for number, passed in enumerate(seconds):
        still._looked -= passed
        still.look((number,))  # nothing is new yet
        still.look((number + 1,))
    return still


def wait(still: Still, seconds: float) -> bool:
    """Whether it is too long, after that much more."""
    still._looked -= seconds
    still.look(still._count)
    return still.too_long


def test_a_step_may_take_as_long_as_was_asked_for() -> None:
    still = standing([1.0, 1.0])
    assert not wait(still, 90.0)
    assert wait(still, 20.0)


def test_the_first_step_may_take_longer_since_it_compiles() -> None:
    still = Still(100.0, 1e6)
    still.look((0, 0))
    assert not wait(still, FIRST_STEP_SECONDS - 10.0)
    assert wait(still, 20.0)


def test_steps_that_have_always_been_slow_are_no_stall() -> None:
    still = standing([1.0, 200.0, 1.0])
    assert not wait(still, 550.0)
    assert wait(still, 100.0)


def test_zero_seconds_are_never_too_long() -> None:
    assert not wait(standing([1.0, 1.0], least=0.0), 1e9)


def test_time_in_which_the_one_who_looks_was_stopped_does_not_count() -> None:
    still = Still(100.0, 5.0)
    still.look((1,))
    assert not wait(still, 1e5)
    assert still.seconds == 10.0


def test_loading_and_waiting_in_order_are_progress_while_the_heart_beats() -> None:
    assert progress({"state": "loading", "beat": 1, "steps": 0}) != progress(
        {"state": "loading", "beat": 2, "steps": 0}
    )
    assert progress({"at_ease": True, "beat": 1, "steps": 9}) != progress({"at_ease": True, "beat": 2, "steps": 9})
    assert progress({"state": "running", "beat": 1, "steps": 9}) == progress(
        {"state": "running", "beat": 2, "steps": 9}
    )


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", prompts(80))


def command(rows: Path, *more: object) -> list[str]:
    """One whose rows take 20 ms each, and that gives up after a second."""
    words = ["run", rows, "-o", rows.parent / "out", "--engine", "echo", "--set", "seconds=0.02", "--batch-size", 5]
    return batchgen(*words, "--heartbeat-seconds", 0.1, "--stall-seconds", 1, *more)


def stuck(rows: Path, rank: int) -> dict[str, str]:
    """The environment in which that rank does not come to the end."""
    (rows.parent / "site").mkdir()
    (rows.parent / "site" / "sitecustomize.py").write_text(STUCK)
    return {"PYTHONPATH": str(rows.parent / "site"), "STUCK": str(rank)}


def stack(rows: Path, rank: int) -> str:
    """What is kept in the run folder of where that rank stood."""
    return (rows.parent / "out" / "attempts" / f"00001-stacks-{rank:05d}.txt").read_text()


def check_ended(rows: Path, ended: Ended, culprit: int) -> None:
    """It ended as one that goes on, says so everywhere, and the same command finishes."""
    out = rows.parent / "out"
    assert ended.code == 75, ended.err
    assert f"s: rank {culprit} (process" in ended.err
    how = found(out).attempts[0].ended or ""
    assert how.startswith("no step for"), how
    assert f": rank {culprit} (process" in how
    assert found(out).open
    again = call(rows.parent, *command(rows, "--set", "seconds=0")[3:])
    assert again.code == 0, again.err
    assert len((out / "generations.jsonl").read_text().splitlines()) == 80


def test_a_lone_process_that_stands_still_says_where_and_ends(rows: Path) -> None:
    with Started(command(rows), rows.parent, stuck(rows, 0)) as process:
        ended = process.end()
    assert "in walks_in_circles" in ended.err
    assert "in walks_in_circles" in stack(rows, 0)
    check_ended(rows, ended, 0)


def test_of_two_ranks_one_in_an_endless_loop_is_named_and_both_say_where_they_are(rows: Path) -> None:
    with Started(command(rows, "--ranks", 2, "--set", "seconds=0.2"), rows.parent, stuck(rows, 1)) as process:
        ended = process.end()
    for rank, function in ((0, "in _generate"), (1, "in walks_in_circles")):
        assert f"rank {rank}, process" in ended.err
        assert function in stack(rows, rank), ended.err
        assert function in ended.err
    check_ended(rows, ended, 1)


def test_of_two_ranks_one_that_is_frozen_is_noticed_by_the_starter(rows: Path) -> None:
    with Started(command(rows, "--ranks", 2, "--set", "seconds=0.2"), rows.parent) as process:
        freeze(rows, 1, process)
        ended = process.end()
    assert "in _generate" in stack(rows, 0)
    assert "in _generate" in ended.err
    for said in (stack(rows, 1), ended.err):
        assert "it does not answer: it is stopped" in said
        assert "stopped (SIGSTOP)" in said
    check_ended(rows, ended, 1)


def test_of_two_ranks_under_srun_one_that_is_frozen_is_noticed_by_rank_0(rows: Path) -> None:
    words = command(rows, "--set", "seconds=0.2")
    with Started(words, rows.parent, step(0, 2)) as first, Started(words, rows.parent, step(1, 2)) as second:
        freeze(rows, 1, first)
        ended = first.end()  # 75, so that srun ends the other one
        assert second.runs()
    assert "in _generate" in stack(rows, 0)
    assert "it is stopped" in stack(rows, 1)
    check_ended(rows, ended, 1)


def test_a_process_that_was_suspended_for_long_goes_on(rows: Path) -> None:
    with Started(command(rows), rows.parent) as process:
        freeze(rows, 0, process)
        time.sleep(2.0)  # twice as long as it may stand still
        process.send(signal.SIGCONT)
        ended = process.end()
    assert ended.code == 0, ended.err
    assert not list((rows.parent / "out" / "attempts").glob("*.txt"))


def freeze(rows: Path, rank: int, process: Started) -> None:
    """Stops that rank, once it has done something."""
    out = rows.parent / "out"
    until(lambda: heartbeats(out).get(rank, {}).get("rows"), process)
    os.kill(int(heartbeats(out)[rank]["pid"]), signal.SIGSTOP)


def test_a_rank_that_another_host_asks_says_where_it_is_and_ends_in_order(rows: Path) -> None:
    out, why = rows.parent / "out", "no step for 9 s: rank 7 (process 1 on elsewhere) stopped answering at step 3"
    with Started(command(rows, "--set", "seconds=0.2"), rows.parent) as process:
        until(lambda: heartbeats(out).get(0, {}).get("rows"), process)
        (out / "attempts" / "00001-stall.txt").write_text(f"{why}\nelsewhere\n")
        ended = process.end()
    assert ended.code == 75, ended.err
    assert "in _generate" in stack(rows, 0)
    assert "in _generate" in ended.err
    assert found(out).attempts[0].ended == why
