"""A rank that stops answering, in the engines whose ranks call together."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.engines.runs import ROOT, command, process_of_rank_1, rows


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ds-zero", "ds-inference"])
def test_a_rank_that_stops_answering_is_named_and_ends_the_attempt(
    engine: str, tiny_llama: Path, tmp_path: Path
) -> None:
    prompts, out = rows(tmp_path / "p.jsonl", 200), tmp_path / "out"
    words = command(prompts, out, tiny_llama, "--batch-size", "2", "--heartbeat-seconds", "0.1", engine=engine)
    words += ["--ranks", "2", "--set", "timeout_seconds=4"]
    starter = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.kill(process_of_rank_1(out, starter, 20), signal.SIGSTOP)
    _, said = starter.communicate(timeout=120)
    assert starter.returncode == 75, said
    assert "no step for 4 s: rank 1 (process" in said, said
    assert "stopped answering" in said
