"""The pages of the manual, as tests read them: their blocks of code, and how a shell runs those of commands.

A block of `sh` is run as it stands, block after block of a page in one folder. A block of `bash` needs a cluster, GPUs
or the internet: its commands are only read. A page whose blocks of `sh` or `python` load a model is slow.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
# One thread: two that wait for each other while the machine is busy take many times as long.
_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*/README.md"))]


def text_of(page: Path) -> str:
    """The page."""
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in their order."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def loads_a_model(page: Path) -> bool:
    """Whether a block that is run imports torch or more; those of `--engine echo` do not."""
    commands = [line for block in blocks(page, "sh") for line in block.splitlines()]
    heavy = re.compile(r"^batchgen (?:run|run-batch|bench|plan)\b(?!.*--engine echo)")
    return any(heavy.match(line) for line in commands)


def run_shell(block: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a block with bash in `folder`, where `examples` is and `batchgen` is this one; ends at the first failure."""
    shims = folder / "bin"
    shims.mkdir(exist_ok=True)
    shim = shims / "batchgen"
    shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m batchgen "$@"\n')
    shim.chmod(0o755)
    environment = {**_ENVIRONMENT, "PATH": f"{shims}:{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", block]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a block of Python in `folder`."""
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=_ENVIRONMENT)
