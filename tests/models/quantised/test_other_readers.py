"""Quantised layers are what the libraries of their formats make of them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.kernels import ROOT
from tests.models.quantised import other_readers


def test_layers_are_what_transformers_makes_of_them() -> None:
    cases = dict(other_readers.compare_with_transformers("cpu"))
    assert len(cases) == 2
    assert all(cases.values()), cases


def test_layers_are_what_compressed_tensors_makes_of_them() -> None:
    beside = ROOT / ".venv" / "compressed"
    if not beside.exists() and importlib.util.find_spec("compressed_tensors") is None:
        why = "no compressed-tensors: scripts/install test"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    variables = {**os.environ, "PYTHONPATH": f"{beside}{os.pathsep}{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH')}"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.models.quantised.other_readers"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    assert result.stdout.splitlines()[-1:] == ["0 wrong"], result.stdout + result.stderr
