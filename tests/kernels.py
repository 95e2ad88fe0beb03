"""Runs the cases of a module of kernels in a process of its own, which may interpret them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


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
