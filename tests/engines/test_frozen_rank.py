"""A rank that stops answering, in the engines whose ranks call together; an engine alone that stands still."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.engines.runs import ROOT, STUCK, altered, command, process_of_rank_1, rows, run


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ds-zero", "ds-inference", "paged"])
def test_a_rank_that_stops_answering_is_named_and_ends_the_attempt(
    engine: str, tiny_llama: Path, tmp_path: Path
) -> None:
    prompts, out = rows(tmp_path / "p.jsonl", 200), tmp_path / "out"
    words = command(prompts, out, tiny_llama, "--batch-size", "2", "--heartbeat-seconds", "0.1", engine=engine)
    words += ["--ranks", "2", "--set", "timeout_seconds=4", *(["--tp", "2"] if engine == "paged" else [])]
    starter = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.kill(process_of_rank_1(out, starter, 20), signal.SIGSTOP)
    _, said = starter.communicate(timeout=120)
    assert starter.returncode == 75, said
    assert "no step for 4 s: rank 1 (process" in said, said
    assert "stopped answering" in said
    kept = [(out / "attempts" / f"00001-stacks-{rank:05d}.txt").read_text() for rank in range(2)]
    for text in (kept[0], said):
        assert "in generate" in text  # and below it whichever collective it waits in
    assert "it is stopped" in kept[1]


@pytest.mark.slow
def test_a_rank_that_never_comes_to_a_collective_ends_the_attempt_with_its_stack(
    tiny_llama: Path, tmp_path: Path
) -> None:
    prompts, out = rows(tmp_path / "p.jsonl", 200), tmp_path / "out"
    words = command(prompts, out, tiny_llama, "--batch-size", "2", "--heartbeat-seconds", "0.1", engine="ds-inference")
    words += ["--ranks", "2", "--set", "timeout_seconds=4"]
    ended = run(*words, environment=altered(tmp_path, STUCK, STUCK="1"))
    assert ended.returncode == 75, ended.stderr
    # Both hearts beat: a rank may have counted the step or not.
    assert "no step for 4 s: " in ended.stderr
    kept = [(out / "attempts" / f"00001-stacks-{rank:05d}.txt").read_text() for rank in range(2)]
    assert "in walks_in_circles" in kept[1]
    assert "in generate" in kept[0]
    assert "in walks_in_circles" not in kept[0]


@pytest.mark.parametrize("engine", ["accelerate", "paged"])
def test_an_engine_alone_that_stands_still_says_where_and_ends(engine: str, tiny_llama: Path, tmp_path: Path) -> None:
    prompts, out = rows(tmp_path / "p.jsonl", 30), tmp_path / "out"
    words = command(prompts, out, tiny_llama, "--batch-size", "2", "--stall-seconds", "2", engine=engine)
    ended = run(*words, environment=altered(tmp_path, STUCK, STUCK="0"))
    assert ended.returncode == 75, ended.stderr
    assert "no step for 2 s: rank 0 (process" in ended.stderr
    for said in (ended.stderr, (out / "attempts" / "00001-stacks-00000.txt").read_text()):
        assert "in walks_in_circles" in said
