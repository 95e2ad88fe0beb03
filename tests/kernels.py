"""Runs the cases of a module of kernels in a process of its own, which may interpret them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def say_cases(*kinds: Callable[[str], Iterator[tuple[str, bool]]]) -> None:
    """Writes a line a case, on the device that the command line names; the last one says how many are wrong.

    Args:
        kinds: each gives, for a device, its cases in words, and whether they are right.
    """
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    wrong = 0
    for line, right in (case for cases in kinds for case in cases(device)):
        wrong += not right
        sys.stdout.write(f"{line} {'' if right else 'WRONG'}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{wrong} wrong\n")


def assert_none_wrong(module: str) -> None:
    """Runs `python -m MODULE DEVICE`, whose last line is how many of its cases are wrong.

    Kernels are interpreted where there is no GPU. Triton is not in the environment: what finds it takes it for a GPU's.
    """
    beside = ROOT / ".venv" / "triton"
    if not beside.exists() and importlib.util.find_spec("triton") is None:
        why = "no triton: scripts/install test"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    variables = {**os.environ, "PYTHONPATH": f"{beside}{os.pathsep}{ROOT}"}
    if device == "cpu":
        variables["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-W", "ignore", "-m", module, device]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    assert result.stdout.splitlines()[-1:] == ["0 wrong"], result.stdout + result.stderr
