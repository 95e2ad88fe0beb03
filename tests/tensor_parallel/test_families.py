"""Each kind of model that may be split gives the logits of one process when it is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchgen.tensor_parallel.autotp import PROVEN
from tests.tensor_parallel import families

MUCH_WHOLE = ("opt", "gpt_neo")
TRIED = sorted(name for name in families.SHAPES if name.partition(" ")[0] in PROVEN)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What two ranks say, by kind of model."""
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "tests.tensor_parallel.families"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return said


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_logits_over_two_ranks_are_those_of_one(name: str, found: dict[str, Any]) -> None:
    assert found[name]["furthest"] < 1e-4
    assert found[name]["equal"]
    # Learnt positions stay whole, much of a model as small as these.
    assert found[name]["share"] < (0.9 if name in MUCH_WHOLE else 0.6)


def test_each_kind_that_may_be_split_is_tried_and_named_in_the_manual() -> None:
    assert {name.partition(" ")[0] for name in TRIED} == PROVEN
    section = (ROOT / "docs" / "gpus.md").read_text().partition("## Tensor parallelism")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", "".join(rows))) - {"model_type", "new_decoder_architecture"} == PROVEN


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(families.SHAPES.keys() - set(TRIED)))
def test_other_kinds_are_refused_by_name(kind: str, found: dict[str, Any]) -> None:
    assert found[kind]["refused"].startswith(f"models of type {kind} have not been shown to generate the right text")
