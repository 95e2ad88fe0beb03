"""The state of a run from its files alone."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.checkpoint import (
    Attempt,
    CheckpointError,
    Heartbeat,
    RunFolder,
    all_heartbeats,
    claim,
    merge_with,
    status,
    write_lines,
)
from batchgen.checkpoint.attempt import newest
from batchgen.types import Shard
from batchgen.world import World
from tests.checkpoint.folders import batch, commit, died, edit, elsewhere, made


def test_a_new_run_is_all_open(tmp_path: Path) -> None:
    found = status(made(tmp_path, 3))
    assert (found.state, found.rows, found.good, found.failed, found.open) == ("new", 3, 0, 0, 3)
    assert (found.attempts, found.tokens_per_second, found.eta_seconds, found.exit_code) == ([], 0.0, None, 75)


def test_an_empty_run_is_finished_and_good(tmp_path: Path) -> None:
    folder = made(tmp_path, 0)
    merge_with(write_lines, folder, 0, "generations.jsonl")
    found = status(folder)
    assert (found.state, found.exit_code) == ("finished", 0)


@pytest.mark.parametrize(
    ("rows", "failed", "state", "code"),
    [([0, 1, 2], [], "finished", 0), ([0, 1, 2], [1], "finished", 3), ([0, 1], [1], "stopped", 75)],
)
def test_the_exit_code_and_state_of_a_run_that_nobody_works_on(
    tmp_path: Path, rows: list[int], failed: list[int], state: str, code: int
) -> None:
    folder = made(tmp_path, 3)
    attempt = claim(folder, World(), {}, 5.0)
    commit(folder, 1, 0, batch(rows, failed=failed))
    attempt.end("stopped by SIGTERM")
    # Until the output files are there, somebody has to start again.
    assert (status(folder).state, status(folder).exit_code) == ("stopped", 75)
    merge_with(write_lines, folder, 3, "generations.jsonl")
    found = status(folder)
    assert (found.state, found.exit_code) == (state, code)
    assert (found.good, found.failed, found.open) == (len(rows) - len(failed), len(failed), 3 - len(rows))
    assert (found.attempts[0].ended, found.attempts[0].live) == ("stopped by SIGTERM", False)
    assert found.eta_seconds is None


def test_a_run_at_work_has_a_rate_and_a_time_left(tmp_path: Path) -> None:
    folder = made(tmp_path, 10)
    attempt = claim(folder, World(), {}, 60.0)
    with Heartbeat(attempt, 0, lambda: {"state": "running", "ready": time.time() - 10, "generated_tokens": 11}):
        commit(folder, 1, 0, batch([0, 1, 2, 3]))  # 8 tokens
        found = status(folder)
        assert found.state == "running"
        assert found.attempts[0].live
        assert found.tokens_per_second == pytest.approx(0.8, rel=0.05)
        assert found.eta_seconds == pytest.approx(15, rel=0.05)  # 6 rows of 2 tokens
        assert (found.attempts[0].generated_tokens, found.attempts[0].lost_tokens) == (11, 3)


def test_a_run_that_still_loads_has_neither(tmp_path: Path) -> None:
    folder = made(tmp_path, 10)
    attempt = claim(folder, World(), {}, 60.0)
    with Heartbeat(attempt, 0, lambda: {"state": "loading", "ready": None, "generated_tokens": 0}):
        found = status(folder)
    assert (found.state, found.tokens_per_second, found.eta_seconds) == ("running", 0.0, None)


def test_lost_tokens_are_counted_for_each_attempt(tmp_path: Path) -> None:
    folder = made(tmp_path, 10)
    for number, (first, second) in {1: (5, 4), 2: (2, 0), 3: (0, 0)}.items():
        attempt = claim(folder, World(), {}, 60.0)
        commit(folder, number, 0, batch([2 * number, 2 * number + 1]))  # 4 tokens
        for rank, tokens in enumerate((first, second)):
            Heartbeat(attempt, rank, lambda tokens=tokens: {"state": "failed", "generated_tokens": tokens}).write()  # type: ignore[misc]
        attempt.end("died")
    # A heartbeat may be older than the last commit: that is no work lost.
    assert [(one.generated_tokens, one.lost_tokens) for one in status(folder).attempts] == [(9, 5), (4, 0), (4, 0)]


def test_a_killed_attempt_is_seen_at_once_on_its_host_and_after_its_limit_elsewhere(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    attempt = died(folder)
    found = status(folder)
    assert (found.state, found.attempts[0].live, found.attempts[0].ended) == ("stopped", False, None)
    elsewhere(attempt)
    beat = folder.attempts / "00001-00000.json"
    edit(beat, time=time.time() + 60)
    assert status(folder).state == "running"
    edit(beat, time=time.time() - 60)
    assert status(folder).state == "stopped"


def test_only_the_newest_attempt_can_be_live(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    elsewhere(died(folder))
    claim(folder, World(), {}, 60.0)
    edit(folder.attempts / "00001-00000.json", time=time.time() + 60)
    assert [one.live for one in status(folder).attempts] == [False, True]


@given(st.lists(st.integers(1, 4).flatmap(lambda n: st.builds(Shard, st.integers(0, n - 1), st.just(n)))))
def test_an_attempt_may_be_live_unless_a_later_one_that_may_be_has_rows_of_it(shards: list[Shard]) -> None:
    known = [Attempt(RunFolder(Path()), number, {"shard": str(shard)}) for number, shard in enumerate(shards)]
    expected: list[int] = []
    for number in reversed(range(len(shards))):
        if not any(shards[number].overlaps(shards[later]) for later in expected):
            expected.append(number)
    assert [one.number for one in newest(known)] == sorted(expected)


def test_heartbeats_of_all_attempts_are_those_of_each(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    made_attempts = [died(folder, ranks=2), died(folder)]
    (folder.attempts / "00002-00007.json").write_text("")  # emptied by a power cut
    (folder.attempts / "notes-1.json").write_text("{}")
    assert all_heartbeats(folder) == {one.number: one.heartbeats() for one in made_attempts}
    assert [sorted(one.heartbeats()) for one in made_attempts] == [[0, 1], [0]]


def test_every_figure_can_be_written_as_json(tmp_path: Path) -> None:
    folder = made(tmp_path, 3)
    died(folder)
    commit(folder, 1, 0, batch([0, 1], failed=[1]))
    values = {**dataclasses.asdict(status(folder)), "folder": ""}
    assert json.loads(json.dumps(values)) == values


def test_what_is_no_run_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no run folder"):
        status(RunFolder(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"is not a run folder: it has no run\.json"):
        status(RunFolder(tmp_path))


def test_damage_is_found_where_it_is_looked_for(tmp_path: Path) -> None:
    folder = made(tmp_path, 2)
    generations, _ = commit(folder, 1, 0, batch([0, 1]))
    generations.write_bytes(generations.read_bytes().replace(b"text", b"tent", 1))
    assert status(folder).good == 2
    assert status(folder, verify=True).open == 2


def test_shards_are_missing_running_failed_or_finished(tmp_path: Path) -> None:
    folder = made(tmp_path, 12)
    assert status(folder).shards == []
    claims = [claim(folder, World(), {}, 5.0, shard=Shard(index, 4)) for index in (0, 1, 2)]
    commit(folder, 1, 0, batch([0, 4, 8], failed=[4]))
    claims[0].end("finished")
    commit(folder, 2, 1, batch([1]))
    claims[1].end("ended with open rows: a rank died")
    found = status(folder)
    assert found.shards == ["finished", "failed", "running", "missing"]
    assert (found.state, found.open) == ("running", 8)
    part = status(folder, Shard(0, 4))
    assert (part.rows, part.good, part.failed, part.open, part.exit_code) == (3, 2, 1, 0, 3)
    assert [attempt.number for attempt in part.attempts] == [1]
    # What is done is a set of rows: they may be spread over another number next time.
    commit(folder, 4, 0, batch([2, 3, 5]))
    claims[2].end("stopped")
    claim(folder, World(), {}, 5.0, shard=Shard(1, 2)).end("stopped")
    assert status(folder).shards == ["missing", "failed"]
