"""Runs of several ranks: started by `--ranks`, by torchrun, by srun; and what becomes of them when one dies."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands.starts import (
    ENVIRONMENT,
    Ended,
    Started,
    batchgen,
    call,
    echo,
    found,
    heartbeats,
    is_alive,
    prompts,
    read_rows,
    recorded,
    slow_echo,
    step,
    until,
    write_rows,
)

ROWS = 200


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", prompts(ROWS))


def texts(run: Path) -> list[str]:
    return [row["text"] for row in read_rows(run / "generations.jsonl")]


WANTED = [row["prompt"] for row in prompts(ROWS)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_do_every_row_once_each_into_files_of_its_own(tmp_path: Path, rows: Path, ranks: int) -> None:
    ended = call(tmp_path, *echo(rows, "-o", "out"), "--ranks", ranks)
    assert (ended.code, ended.out) == (0, "out/generations.jsonl\n")
    assert "finished; 200 of 200 rows good" in ended.err
    run = tmp_path / "out"
    assert texts(run) == WANTED
    files = [f"generations-00001-{rank:05d}.jsonl" for rank in range(ranks)]
    assert sorted(path.name for path in run.glob("generations-*")) == files
    for rank, name in enumerate(files):
        assert sorted(row["index"] for row in read_rows(run / name)) == list(range(rank, ROWS, ranks))
    assert {batch["rank"] for batch in read_rows(run / "timing.jsonl")} == set(range(ranks))


def test_more_ranks_than_rows_and_failed_rows_finish(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}, "{broken"])
    ended = call(tmp_path, *echo(rows), "--ranks", 3)
    assert (ended.code, ended.out) == (3, "p/generations.jsonl\n")
    assert [row["text"] for row in read_rows(tmp_path / "p/generations.jsonl")] == ["a", None]


def test_killed_rank_ends_the_others_and_the_run_resumes(tmp_path: Path, rows: Path) -> None:
    out = tmp_path / "out"
    with Started(batchgen(*slow_echo(rows, "-o", out), "--ranks", 2), tmp_path) as process:
        until(lambda: recorded(out) and len(heartbeats(out)) == 2, process)
        pids = {rank: beat["pid"] for rank, beat in heartbeats(out).items()}
        subprocess.run(["kill", "-KILL", str(pids[1])], check=True)
        ended = process.end()
    assert (ended.code, ended.out) == (75, "")
    death = "rank 1 died (killed by SIGKILL, as the system does when memory runs out)"
    assert death in ended.err
    assert "; ending the others" in ended.err
    assert f"batchgen: {death}" in ended.err.splitlines()[-1]
    assert ended.err.count("same command goes on") == 1
    assert not any(map(is_alive, pids.values()))
    assert heartbeats(out)[0]["state"] == "stopped"  # it has ended cleanly
    assert call(tmp_path, *slow_echo(rows, "-o", out), "--ranks", 3).code == 0
    assert texts(out) == WANTED


def test_the_death_of_a_rank_names_the_rows_that_it_had_in_work(tmp_path: Path) -> None:
    out, rows = tmp_path / "out", write_rows(tmp_path / "p.jsonl", prompts(2))
    words = [*echo(rows, "-o", out), "--set", "seconds=3", "--ranks", 2, "--heartbeat-seconds", 0.05]
    with Started(batchgen(*words), tmp_path) as process:
        until(lambda: heartbeats(out).get(1, {}).get("in_work"), process)
        subprocess.run(["kill", "-SEGV", str(heartbeats(out)[1]["pid"])], check=True)
        ended = process.end()
    assert ended.code == 75
    assert "rank 1 died (killed by SIGSEGV) with row row-1 in work; ending the others" in ended.err


def test_no_rank_outlives_a_killed_starter(tmp_path: Path, rows: Path) -> None:
    out = tmp_path / "out"
    with Started(batchgen(*slow_echo(rows, "-o", out), "--ranks", 2), tmp_path) as process:
        until(lambda: recorded(out) and len(heartbeats(out)) == 2, process)
        pids = [beat["pid"] for beat in heartbeats(out).values()]
        assert all(map(is_alive, pids))
        process.send(signal.SIGKILL)
        process.end()
        until(lambda: not any(map(is_alive, pids)))
    assert found(out).state == "stopped"
    assert call(tmp_path, *echo(rows, "-o", out)).code == 0
    assert texts(out) == WANTED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signal_is_passed_on_and_all_end_in_order(tmp_path: Path, rows: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    with Started(batchgen(*slow_echo(rows, "-o", out), "--ranks", 2), tmp_path) as process:
        until(lambda: recorded(out) and len(heartbeats(out)) == 2, process)
        process.send(number)
        ended = process.end()
    assert (ended.code, ended.out) == (75, "")
    assert f"batchgen: stopped by {number.name}" in ended.err
    assert "died" not in ended.err
    assert [beat["state"] for beat in heartbeats(out).values()] == ["stopped", "stopped"]
    assert call(tmp_path, *echo(rows, "-o", out)).code == 0
    assert texts(out) == WANTED


def test_second_interrupt_ends_the_ranks_at_once(tmp_path: Path, rows: Path) -> None:
    out = tmp_path / "out"
    stuck = [*echo(rows, "-o", out), "--set", "seconds=1000", "--ranks", 2, "--heartbeat-seconds", 0.1]
    with Started(batchgen(*stuck), tmp_path) as process:
        until(lambda: [beat["steps"] for beat in heartbeats(out).values()] == [1, 1], process)
        pids = [beat["pid"] for beat in heartbeats(out).values()]
        process.send(signal.SIGINT)
        # Two signals that wait together are one: the first has been passed on when the ranks know of it.
        until(lambda: all(beat["reason"] for beat in heartbeats(out).values()), process)
        process.send(signal.SIGINT)
        assert process.end().code == 75
    assert not any(map(is_alive, pids))


def test_what_ends_every_rank_is_said_once_and_before_they_start(tmp_path: Path, rows: Path, tiny_llama: Path) -> None:
    offload = ["--engine", "ds-zero", "--offload", f"nvme={tmp_path / 'gone'}"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    words = ["run", rows, "-o", "out", "--model", tiny_llama, "--ranks", 2, *offload]
    ended = call(tmp_path, *words, environment=environment)
    assert (ended.code, ended.out) == (4, "")
    sentence = f"Error: offload=nvme={tmp_path / 'gone'}: there is no such folder here."
    assert ended.err.splitlines()[-1].startswith(sentence)
    assert ended.err.count("no such folder") == 1
    assert "above" not in ended.err
    assert not (tmp_path / "out").exists()


def test_rank_that_cannot_start_is_exit_4_with_its_sentence(tmp_path: Path, rows: Path, tiny_llama: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))  # shows when weights are loaded
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    ended = call(tmp_path, "run", rows, "-o", "out", "--model", model, "--ranks", 2, environment=environment)
    assert (ended.code, ended.out) == (4, "")
    assert "Traceback" not in ended.err
    said = [line for line in ended.err.splitlines() if str(model) in line]
    assert len(said) == 1
    assert re.match(rf"Error: (rank [01]: )?the model in {model} cannot be loaded: its weights have other", said[0])
    assert found(tmp_path / "out").attempts[0].ended.startswith("failed: RankError: ")


def under_srun(folder: Path, *arguments: object) -> tuple[Ended, Ended]:
    command = batchgen(*arguments, "--ranks", 2)
    with Started(command, folder, step(0, 2)) as first, Started(command, folder, step(1, 2)) as second:
        return first.end(), second.end()


def test_under_srun_each_task_is_a_rank_and_the_last_one_merges(tmp_path: Path, rows: Path) -> None:
    for ended in under_srun(tmp_path, *echo(rows, "-o", "out")):
        assert (ended.code, ended.out) == (0, ""), ended.err
    assert texts(tmp_path / "out") == WANTED
    assert len(heartbeats(tmp_path / "out")) == 2
    assert [attempt.ended for attempt in found(tmp_path / "out").attempts] == ["finished"]


def test_under_srun_tasks_exit_0_with_failed_rows_and_status_tells(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", ["{broken", {"prompt": "a"}])
    assert [ended.code for ended in under_srun(tmp_path, *echo(rows))] == [0, 0]
    assert call(tmp_path, "status", "p", "--exit-code").code == 3


def test_under_srun_a_stopped_run_exits_0_and_the_next_step_goes_on(tmp_path: Path, rows: Path) -> None:
    out = tmp_path / "out"
    command = batchgen(*slow_echo(rows, "-o", out))
    with Started(command, tmp_path, step(0, 2)) as first, Started(command, tmp_path, step(1, 2)) as second:
        until(lambda: recorded(out) and len(heartbeats(out)) == 2, first)
        for process in (first, second):
            process.send(signal.SIGTERM)
        assert [first.end().code, second.end().code] == [0, 0]
    assert call(tmp_path, "status", out, "--exit-code").code == 75
    assert found(out).attempts[0].ended == "stopped by SIGTERM"
    assert [ended.code for ended in under_srun(tmp_path, *echo(rows, "-o", out))] == [0, 0]
    assert texts(out) == WANTED


def test_task_that_comes_when_rank_0_has_no_work_left_still_does_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = write_rows(tmp_path / "p.jsonl", prompts(4))
    command = batchgen(*echo(rows, "-o", out))
    with Started(command, tmp_path, step(0, 2)) as first:
        until(lambda: recorded(out) == 2, first)
        time.sleep(0.5)
        with Started(command, tmp_path, step(1, 2)) as second:
            assert [first.end().code, second.end().code] == [0, 0]
    assert texts(out) == [row["prompt"] for row in prompts(4)]


def test_batch_script_outside_srun_is_alone_and_refused_where_it_would_leave_tasks_idle(
    tmp_path: Path, rows: Path
) -> None:
    script = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    refused = call(tmp_path, *echo(rows, "-o", "out"), environment=script)
    assert refused.code == 4
    assert "job 7 has 1 node(s) and 8 tasks" in refused.err
    assert not (tmp_path / "out").exists()
    assert call(tmp_path, *echo(rows, "-o", "out"), environment=script | {"SLURM_NTASKS": "1"}).code == 0
    assert texts(tmp_path / "out") == WANTED


def test_contradicting_variables_are_exit_4(tmp_path: Path, rows: Path) -> None:
    ended = call(tmp_path, *echo(rows), environment={"RANK": "3", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert ended.code == 4
    assert "the launcher's variables do not fit together" in ended.err


@pytest.mark.slow
def test_under_torchrun_none_is_started_and_the_last_rank_merges(tmp_path: Path, rows: Path) -> None:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "batchgen",
    ]
    command = [*launcher, *map(str, echo(rows, "-o", "out", "--ranks", "2"))]
    ended = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
    assert texts(tmp_path / "out") == WANTED
    assert len(heartbeats(tmp_path / "out")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "ranks"), [("auto", 1), ("echo", 2), ("auto", 2)])
def test_that_a_column_is_ignored_is_said_once_a_run(tmp_path: Path, tiny_llama: Path, engine: str, ranks: int) -> None:
    lines = [{**row, "max_tokens": 5} for row in prompts(12)] + [{"prompt": "x", "system": "y"}]
    rows = write_rows(tmp_path / "p.jsonl", lines)
    words = ["--engine", engine, "--model", tiny_llama, "--max-new-tokens", 2, "--ranks", ranks]
    ended = call(tmp_path, "run", rows, "-o", "out", *words)
    assert ended.code == 0, ended.err
    for column in ("max_tokens", "system"):
        assert ended.err.count(f'the column "{column}" is carried along and changes no text') == 1, ended.err


def test_under_srun_rank_0_says_for_all_that_a_column_is_ignored(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", [{**row, "max_tokens": 5} for row in prompts(8)])
    first, second = under_srun(tmp_path, *echo(rows, "-o", "out"))
    assert (first.code, second.code) == (0, 0)
    sentence = 'the column "max_tokens" is carried along and changes no text'
    assert (first.err.count(sentence), second.err.count(sentence)) == (1, 0)
