"""Ranks that meet, or do not: real processes of the command line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def rank_0_of_2(prompts: Path, model: Path, port: int, engine: str) -> subprocess.CompletedProcess[str]:
    """What rank 0 does; rank 1 never comes."""
    words = ["run", prompts, "-o", prompts.parent / "out", "--model", model, "--engine", engine, "--dtype", "float32"]
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.run(
        [sys.executable, "-m", "batchgen", *map(str, words), "--set", "timeout_seconds=1"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "abc"}) + "\n")
    return path


def test_a_rank_that_never_comes_leaves_a_run_that_goes_on(prompts: Path, tiny_bloom: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = rank_0_of_2(prompts, tiny_bloom, port, "ds-inference")
    assert done.returncode == 75, done.stderr
    assert "rank 0 of 2 cannot join the other ranks at 127.0.0.1" in done.stderr
    assert "have not met all the others in time" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_another_program_has_is_a_sentence(prompts: Path, tiny_bloom: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = rank_0_of_2(prompts, tiny_bloom, other.getsockname()[1], "ds-zero")
    assert done.returncode == 4, done.stderr
    assert "If another job has that port, MASTER_PORT names another one" in done.stderr
