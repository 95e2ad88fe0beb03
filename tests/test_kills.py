"""A run that is killed with -9 again and again ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kills import kill_and_resume, save_model


@pytest.mark.slow
def test_killed_runs_lose_and_repeat_nothing(tmp_path: Path) -> None:
    history = kill_and_resume(save_model(tmp_path / "model"), tmp_path, kills=3, seed=7)
    assert len(history.kills) == 3
    assert sum(history.in_flight) > 0, "no kill struck a batch; choose another seed"
