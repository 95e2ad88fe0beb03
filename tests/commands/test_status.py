"""`batchgen status`: of runs that work, that died, that are finished, and of what is no run."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.commands.starts import Started, batchgen, call, echo, prompts, recorded, slow_echo, until, write_rows


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", prompts(200))


def test_status_of_a_run_that_works_and_of_the_same_run_killed(tmp_path: Path, rows: Path) -> None:
    out = tmp_path / "out"
    with Started(batchgen(*slow_echo(rows, "-o", out), "--heartbeat-seconds", 0.05), tmp_path) as process:
        until(lambda: recorded(out) > 10, process)
        text, figures = call(tmp_path, "status", out), call(tmp_path, "status", out, "--json", "--exit-code")
        assert process.runs()
        process.send(signal.SIGKILL)
        process.end()
    assert (text.code, text.err) == (0, "")
    assert text.out.startswith(f"{out}: running\n  rows    ")
    assert " tokens/s now\n  left    about " in text.out
    assert f"attempt 1, process {process.pid} on " in text.out
    assert text.out.endswith("1 rank(s): works\n")
    values = json.loads(figures.out)
    assert figures.code == values["exit_code"] == 75
    assert (values["state"], values["rows"], values["folder"]) == ("running", 200, str(out))
    assert 10 < values["good"] < 200
    assert values["good"] + values["open"] == 200
    assert values["eta_seconds"] > 0
    assert values["attempts"][0]["live"] is True

    dead = json.loads(call(tmp_path, "status", out, "--json").out)
    assert (dead["state"], dead["eta_seconds"], dead["attempts"][0]["ended"]) == ("stopped", None, None)
    assert "rank(s): died" in call(tmp_path, "status", out).out


@pytest.mark.parametrize(("extra", "code"), [([], 0), (["{broken"], 3)], ids=["good", "failed"])
def test_exit_code_is_that_of_the_run(tmp_path: Path, extra: list[str], code: int) -> None:
    assert call(tmp_path, *echo(write_rows(tmp_path / "p.jsonl", [*prompts(3), *extra]))).code == code
    assert call(tmp_path, "status", "p", "--exit-code").code == code
    ended = call(tmp_path, "status", "p")
    assert ended.code == 0
    assert ended.out.startswith(f"p: finished\n  rows    3 good, {len(extra)} failed, 0 open, of {3 + len(extra)}\n")
    assert ended.out.endswith("1 rank(s): finished\n")


def test_status_writes_nothing(tmp_path: Path, rows: Path) -> None:
    assert call(tmp_path, *echo(rows, "-o", "out")).code == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("*"))
    assert call(tmp_path, "status", "out").code == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("none", "there is no run folder none"),
        ("empty", "empty is not a run folder: it has no run.json"),
        ("prompts.jsonl", "there is no run folder prompts.jsonl"),
        ("damaged", "run.json is damaged"),
    ],
)
@pytest.mark.parametrize("command", ["status", "merge"])
def test_what_is_no_run_is_exit_4(tmp_path: Path, rows: Path, command: str, name: str, sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/run.json").write_text("{")
    ended = call(tmp_path, command, name)
    assert (ended.code, ended.out) == (4, "")
    assert sentence in ended.err
    assert "Traceback" not in ended.err


def test_shards_that_slurm_did_not_start_are_done_by_the_command_that_did_them(tmp_path: Path, rows: Path) -> None:
    assert call(tmp_path, *echo(rows, "-o", "out"), "--shard", "1/4").code == 0
    said = call(tmp_path, "status", "out").out
    assert "  missing shards 0,2-3 of 4\n" in said
    assert said.endswith("  again   the same command, with --shard I/4 for each I of 0,2-3\n")
    assert "sbatch" not in said
