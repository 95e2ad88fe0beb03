"""A package that is not there, or cannot be imported, is a sentence with its name, before anything is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from batchgen.packages import is_installed
from tests.commands.starts import ENVIRONMENT, call, prompts, write_rows

ROOT = Path(__file__).parents[1]

# In one process, since torch takes seconds: hides packages from imports, and runs the command for each case.
HIDING = """
import contextlib, importlib.machinery, io, json, os, sys

class Hiding(importlib.machinery.PathFinder):
    hidden = ""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == cls.hidden else super().find_spec(name, path, target)

sys.meta_path[:] = [Hiding if one is importlib.machinery.PathFinder else one for one in sys.meta_path]
from batchgen import packages
from batchgen.commands import main

said = []
for package, words in json.loads(sys.argv[1]):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    Hiding.hidden = package
    if package == "":
        sys.path.insert(0, "stub")
    sys.argv[1:] = words
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(words)
        except SystemExit as error:
            said.append((error.code, err.getvalue(), os.path.exists("out")))
Hiding.hidden = "triton"
try:
    import batchgen.engines.paged.kernels
except ImportError as error:
    said.append((4, packages.explain_import_error(error)))
print(json.dumps(said))
"""

GONE = [
    ("deepspeed", "engine ds-zero", "--engine ds-zero --ranks 2"),
    ("accelerate", "engine ds-zero", "--engine ds-zero"),
    ("deepspeed", "engine ds-inference", "--engine ds-inference"),
    ("deepspeed", "engine paged", "--engine paged --tp 2"),
    ("accelerate", "engine paged", "--engine paged"),
    ("accelerate", "engine accelerate", "--engine accelerate --ranks 4"),
    ("bitsandbytes", "engine accelerate", "--engine accelerate --dtype int8"),
]


BROKEN = (
    "engine ds-inference needs the package deepspeed, which cannot be imported "
    "(ImportError: libcuda_of_another_time.so: cannot open shared object file)"
)


def break_deepspeed(place: Path) -> None:
    """Puts a package of that name into `place` that cannot be imported."""
    (place / "deepspeed").mkdir(parents=True)
    error = "libcuda_of_another_time.so: cannot open shared object file"
    (place / "deepspeed" / "__init__.py").write_text(f"raise ImportError({error!r})\n")


def test_each_engine_names_the_package_that_is_not_there(tiny_llama: Path, tmp_path: Path) -> None:
    missing = [name for name in {package for package, _, _ in GONE} if not is_installed(name)]
    if missing:  # the sentence is about the first one that an engine misses, and the cases hide one at a time
        pytest.skip(f"not installed: {', '.join(missing)}")
    write_rows(tmp_path / "p.jsonl", prompts(3))
    run = ["run", "p.jsonl", "-o", "out", "--model", str(tiny_llama)]
    cases = [(package, [*run, *words.split()]) for package, _, words in GONE]
    cases.append(("bitsandbytes", [*run, "--dtype", "nf4"]))
    cases.append(("", [*run, "--engine", "ds-inference"]))
    break_deepspeed(tmp_path / "stub")
    command = [sys.executable, "-c", HIDING, json.dumps(cases)]
    ended = subprocess.run(
        command, cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    *said, chosen, broken, kernels = json.loads(ended.stdout.splitlines()[-1])
    for (package, what, _), (code, text, is_begun) in zip(GONE, said, strict=True):
        sentence = f"{what} needs the package {package}, which is not installed here. Install it: pip install {package}"
        assert (code, text, is_begun) == (4, f"Error: {sentence}\n", False)
    assert chosen[0] == 4
    assert "no engine can do this: the package bitsandbytes is not installed: accelerate" in chosen[1]
    assert (
        kernels[1] == "batchgen needs the package triton, which is not installed here. Install it: pip install triton"
    )
    assert (broken[0], BROKEN in broken[1], "Traceback" in broken[1]) == (4, True, False)


@pytest.mark.slow
def test_a_package_that_cannot_be_imported_is_said_once_however_many_ranks_need_it(
    tiny_llama: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "p.jsonl", prompts(8))
    break_deepspeed(tmp_path / "stub")
    environment = {"PYTHONPATH": f"{tmp_path / 'stub'}:{ROOT}", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    words = ["run", "p.jsonl", "-o", "out", "--model", tiny_llama, "--engine", "ds-inference", "--ranks", 2]
    ended = call(tmp_path, *words, environment=environment)
    assert (ended.code, ended.out) == (4, "")
    assert ended.err.count(BROKEN) == ended.err.count("deepspeed, which cannot be imported") == 1
    assert "Traceback" not in ended.err
    assert "same command" not in ended.err
