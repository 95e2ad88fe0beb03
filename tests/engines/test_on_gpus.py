"""Ranks on GPUs of their own, through NCCL: what CPUs cannot show. Run with `pytest -m gpu` where there are two."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from batchgen.runs.launcher import GRACE_SECONDS
from tests import tiny_models as models
from tests.engines.runs import (
    ROOT,
    STUCK,
    STUCK_STEP,
    altered,
    command,
    process_of_rank_1,
    read,
    rows,
    run,
    texts,
    texts_alone,
)
from tests.tensor_parallel.test_texts import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.timeout(300),
]

Record = Callable[[str, object], None]

_PATIENCE = 4  # s
_GPUS = [count for count in (2, 4, 8) if count <= torch.cuda.device_count()]
# Paged would take all memory for its cache, and tests may run side by side.
_CACHE = ["--set", "cache_tokens=20000"]
_TOGETHER = {
    "ds-zero": [],
    "ds-zero:offload=cpu": ["--set", "offload=cpu"],
    "ds-inference": ["--tp", "2"],
    "paged:tp=2": ["--tp", "2", *_CACHE],
}
_SYSTEMS = {"accelerate": [], "paged": _CACHE, **_TOGETHER}


def words(system: str, prompts: Path, out: Path, model: Path, gpus: int, *more: object) -> list[str]:
    """The command of a run over this many GPUs."""
    given = [*_SYSTEMS[system], "--ranks", str(gpus), "--heartbeat-seconds", "0.1", *map(str, more)]
    return command(prompts, out, model, *given, engine=system.partition(":")[0])


def check_resumed(again: list[str], prompts: Path, out: Path, model: Path, scratch: Path) -> None:
    """The same command finishes: every row once, with the text of one process."""
    done = run(*again)
    assert done.returncode == 0, done.stderr
    ids = [row["id"] for row in read(out)]
    assert len(ids) == len(set(ids)) == len(prompts.read_text().splitlines())
    assert texts(out) == texts_alone(prompts, model, scratch)


@pytest.mark.parametrize("gpus", _GPUS)
@pytest.mark.parametrize("system", _SYSTEMS)
@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_the_text_is_that_of_one_gpu(
    kind: str, system: str, gpus: int, tiny_llama: Path, tiny_bloom: Path, tmp_path: Path
) -> None:
    model = tiny_llama if kind == "llama" else tiny_bloom
    prompts = rows(tmp_path / "p.jsonl", 61)
    done = run(*words(system, prompts, tmp_path / "out", model, gpus, "--batch-size", 4))
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path / "out") == texts_alone(prompts, model, tmp_path / "one")


@pytest.mark.parametrize("system", _TOGETHER)
@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "qwen3_moe"])
def test_experts_on_two_gpus_have_the_text_of_one(family: str, system: str, tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", partial(build, name=family))
    prompts = rows(tmp_path / "p.jsonl", 61)
    done = run(*words(system, prompts, tmp_path / "out", model, 2, "--batch-size", 4))
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path / "out") == texts_alone(prompts, model, tmp_path / "one")


@pytest.mark.parametrize("system", _SYSTEMS)
def test_a_killed_rank_ends_the_others_in_time_and_the_run_goes_on(
    system: str, tiny_llama: Path, tmp_path: Path, record_property: Record
) -> None:
    prompts, out = rows(tmp_path / "p.jsonl", 3000 if system == "paged" else 300), tmp_path / "out"
    first = words(system, prompts, out, tiny_llama, 2, *(() if system == "paged" else ("--batch-size", 2)))
    starter = subprocess.Popen(first, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.kill(process_of_rank_1(out, starter, 20), signal.SIGKILL)
    begun = time.monotonic()
    _, said = starter.communicate(timeout=120)
    seconds = time.monotonic() - begun
    record_property("seconds", round(seconds, 1))
    assert starter.returncode == 75, said
    assert "rank 1 died" in said
    assert seconds < GRACE_SECONDS + 10
    check_resumed(first[:-2] if "--batch-size" in first else first, prompts, out, tiny_llama, tmp_path / "one")


@pytest.mark.parametrize("system", _TOGETHER)
@pytest.mark.parametrize("how", ["frozen", "stuck"])
def test_ranks_that_wait_for_one_in_vain_end_and_say_where(
    how: str, system: str, tiny_llama: Path, tmp_path: Path, record_property: Record
) -> None:
    prompts, out = rows(tmp_path / "p.jsonl", 300), tmp_path / "out"
    first = words(system, prompts, out, tiny_llama, 2, "--set", f"timeout_seconds={_PATIENCE}", "--batch-size", 2)
    fault = STUCK_STEP if system.startswith("paged") else STUCK
    stuck = altered(tmp_path, fault, STUCK="1" if how == "stuck" else "")
    starter = subprocess.Popen(first, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | stuck)
    process = process_of_rank_1(out, starter, 20)
    if how == "frozen":
        os.kill(process, signal.SIGSTOP)
    begun = time.monotonic()
    _, said = starter.communicate(timeout=120)
    record_property("seconds", round(time.monotonic() - begun, 1))
    assert starter.returncode == 75, said
    assert f"no step for {_PATIENCE} s: " in said
    kept = [(out / "attempts" / f"00001-stacks-{rank:05d}.txt").read_text() for rank in range(2)]
    assert "in generate" in kept[0]
    assert ("in walks_in_circles" if how == "stuck" else "it is stopped") in kept[1]
    check_resumed(first, prompts, out, tiny_llama, tmp_path / "one")
