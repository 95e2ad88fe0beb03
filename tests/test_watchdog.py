"""Whom the watchdog names, from heartbeats as real ranks write them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from batchgen import checkpoint
from batchgen.checkpoint import Attempt, Heartbeat
from batchgen.watchdog import culprits
from tests.checkpoint import folders

PATIENCE = 4.0  # s


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return checkpoint.claim(folders.made(tmp_path, 8), folders.ALONE, {}, 0.1)


def beat(attempt: Attempt, rank: int, steps: int, *, age: float = 0.0, state: str = "running") -> None:
    """One heartbeat of `rank`, written `age` seconds ago."""
    Heartbeat(attempt, rank, lambda: {"state": state, "steps": steps}).beat()
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
