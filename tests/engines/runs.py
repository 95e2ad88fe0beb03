"""Runs of the command line with engines whose ranks call together: rows for them, their texts, their processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import batchgen

ROOT = Path(__file__).parents[2]

# For sitecustomize: on the rank STUCK, the 60th forward comes to no end.
STUCK = """
import itertools, os
if os.environ.get("RANK", "0") == os.environ.get("STUCK"):
    import torch
    embedding, forwards = torch.nn.functional.embedding, itertools.count()
    def walks_in_circles(*arguments, **options):
        while next(forwards) >= 60:
            pass
        return embedding(*arguments, **options)
    torch.nn.functional.embedding = walks_in_circles
"""

# The same of engine `paged`, whose forwards on a GPU are recorded: on the rank STUCK, the 60th step does not begin.
STUCK_STEP = """
import itertools, os
if os.environ.get("RANK", "0") == os.environ.get("STUCK"):
    from batchgen.engines.paged import runner
    launch, steps = runner.Runner.launch, itertools.count()
    def walks_in_circles(*arguments):
        while next(steps) >= 60:
            pass
        return launch(*arguments)
    runner.Runner.launch = walks_in_circles
"""

# For sitecustomize: rank 1 runs out of memory inside a forward of more than 3 rows.
OUT_OF_MEMORY = """
import os
if os.environ.get("RANK") == "1":
    import torch
    embedding = torch.nn.functional.embedding
    def small(ids, *weight, **options):
        if ids.dim() == 2 and ids.shape[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        return embedding(ids, *weight, **options)
    torch.nn.functional.embedding = small
"""


def altered(folder: Path, code: str, **more: str) -> dict[str, str]:
    """Variables with which each Python process runs `code` first, a sitecustomize that is put into `folder`."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', ROOT)}", **more}


def rows(path: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    with path.open("w") as file:
        for number in range(count):
            # Of the texts tried, one whose best two logits are never closer than 1e-3: batches may round differently.
            row = {"prompt": "abcdefh " * (number % 9), "max_new_tokens": 5 + 37 * (number % 3)}
            if number in bad:
                row = {"prompt": number}
            file.write(json.dumps(row) + "\n")
    return path


def command(prompts: Path, out: Path, model: Path, *more: str, engine: str = "ds-zero") -> list[str]:
    words = ["run", str(prompts), "-o", str(out), "--model", str(model), "--engine", engine, "--dtype", "float32"]
    return [sys.executable, "-m", "batchgen", *words, *more]


def run(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    words = list(map(str, arguments))
    return subprocess.run(words, capture_output=True, text=True, env=variables, timeout=240, cwd=ROOT)


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]


def texts(out: Path) -> list[object]:
    return [row["text"] for row in read(out)]


def texts_alone(prompts: Path, model: Path, scratch: Path) -> list[object]:
    """Those of one process without shards, this one."""
    batchgen.run(str(prompts), scratch, batchgen.RunSettings(model=str(model), engine="accelerate", dtype="float32"))
    return texts(scratch)


def ended_by(number: signal.Signals, words: Sequence[str], out: Path, most: int = 20, attempt: int = 1) -> str:
    """What a run has said that ended, to go on later, since its rank 1 got this signal after more than `most` steps."""
    starter = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.kill(process_of_rank_1(out, starter, most, attempt), number)
    _, said = starter.communicate(timeout=120)
    assert starter.returncode == 75, said
    return str(said)


def process_of_rank_1(out: Path, starter: subprocess.Popen[str], most: int, attempt: int = 1, of: str = "steps") -> int:
    """Its id, as soon as its heartbeat counts more than that in that attempt: of steps, or what else it counts."""
    beat = out / "attempts" / f"{attempt:05d}-00001.json"
    while not (beat.exists() and json.loads(beat.read_bytes())[of] > most):
        assert starter.poll() is None, "the run ended before"
        time.sleep(0.05)
    return int(json.loads(beat.read_bytes())["pid"])
