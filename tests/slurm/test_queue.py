"""What `cancel` and `status` make of Slurm's answers, and of none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from batchgen import slurm
from batchgen.commands import main
from tests.commands.starts import call, echo, prompts, write_rows
from tests.slurm.fakes import NO_ACCOUNTING, NO_CONTROLLER, NO_SUCH_JOB, have


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of four shards, whose job has not begun."""
    slurm.remember(tmp_path / "out", slurm.Job("12", 0, "/a.sbatch", shards=4))
    return tmp_path / "out"


def batchgen(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])


@pytest.mark.parametrize(
    ("commands", "sentence"),
    [
        ({}, "the queue cannot be read: there is no squeue here"),
        ({"squeue": NO_CONTROLLER}, "Unable to contact slurm controller"),
        ({"squeue": NO_CONTROLLER, "sacct": NO_ACCOUNTING}, "Unable to contact slurm controller"),
        ({"squeue": NO_CONTROLLER, "sacct": "exit 0"}, "Unable to contact slurm controller"),
    ],
)
def test_a_job_that_nobody_can_be_asked_about_may_be_running(
    commands: dict[str, str], sentence: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(tmp_path, monkeypatch, scancel="exit 0", **commands)
    cancelled = batchgen("cancel", run)
    assert cancelled.exit_code == 4, cancelled.output
    assert sentence in cancelled.output
    assert f"Nothing was cancelled: jobs of {run} may be running (12)" in cancelled.output
    said = batchgen("status", run)
    assert said.exit_code == 0, said.output
    assert "jobs    12: the queue cannot be read" in said.stdout
    assert sentence in said.stdout
    assert "missing shards 0-3 of 4" in said.stdout
    assert "again" not in said.stdout
    figures = batchgen("status", run, "--json", "--exit-code")
    assert figures.exit_code == 75
    assert json.loads(figures.stdout)["jobs"] == []
    assert sentence in json.loads(figures.stdout)["queue_error"]


@pytest.mark.parametrize("squeue", [NO_SUCH_JOB, "exit 0"])
def test_a_job_that_slurm_has_forgotten_is_in_no_queue(
    squeue: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(tmp_path, monkeypatch, squeue=squeue, sacct=NO_ACCOUNTING)
    cancelled = batchgen("cancel", run)
    assert (cancelled.exit_code, cancelled.stderr) == (0, f"batchgen: no job of {run} is in the queue\n")
    assert "  again   sbatch --array=0-3 /a.sbatch" in batchgen("status", run).stdout
    assert json.loads(batchgen("status", run, "--json").stdout)["queue_error"] is None


def test_where_the_queue_cannot_be_read_the_accounting_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "12_0|COMPLETED|n1|a|b\n12_1|RUNNING|n1|a|Unknown\n12_[2-3]|PENDING||Unknown|Unknown"
    folder = have(tmp_path, monkeypatch, squeue=NO_CONTROLLER, sacct=f"echo '{lines}'", scancel='echo "$@" > "$0.said"')
    said = batchgen("status", run).stdout
    assert "12_1: RUNNING on n1" in said
    assert "again" not in said, "the tasks that wait are one line there"
    cancelled = batchgen("cancel", run)
    assert (cancelled.exit_code, cancelled.stdout) == (0, "12\n"), cancelled.output
    assert (folder / "scancel.said").read_text() == "--quiet 12\n"


def test_status_of_a_finished_run_needs_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(tmp_path, *echo(write_rows(tmp_path / "p.jsonl", prompts(3)), "-o", "out")).code == 0
    slurm.remember(tmp_path / "out", slurm.Job("12", 0))
    have(tmp_path, monkeypatch)
    said = batchgen("status", tmp_path / "out", "--exit-code")
    assert said.exit_code == 0, said.output
    assert said.stdout.startswith(f"{tmp_path / 'out'}: finished\n  rows    3 good")
