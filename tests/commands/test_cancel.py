"""`batchgen cancel` of what it knows no job of; jobs themselves are in tests/slurm."""

from __future__ import annotations

from pathlib import Path

from tests.commands.starts import call


def test_no_run_folder_and_a_run_without_a_job_are_told_apart(tmp_path: Path) -> None:
    ended = call(tmp_path, "cancel", "none")
    assert (ended.code, ended.out) == (4, "")
    assert "there is no run folder none" in ended.err
    (tmp_path / "none").mkdir()
    ended = call(tmp_path, "cancel", "none")
    assert (ended.code, ended.out) == (4, "")
    assert "none knows of no Slurm job" in ended.err
