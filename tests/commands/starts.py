"""Starts `batchgen` as people do, as a process of its own, and looks at what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchgen.checkpoint import RunFolder, Status, status

# Of a launcher around the tests themselves, if there is one.
_LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "BATCHGEN_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}


@dataclass
class Ended:
    """A process that has ended."""

    code: int
    out: str
    err: str


class Started:
    """A process under way; ended, whatever the test does, by leaving the block."""

    def __init__(
        self,
        command: Iterable[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            list(command),
            cwd=folder,
            env={**ENVIRONMENT, "PYTHONWARNINGS": "error", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=before,
        )
        self.pid = self._process.pid

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def runs(self) -> bool:
        return self._process.poll() is None

    def end(self) -> Ended:
        """Waits for it."""
        out, err = self._process.communicate(timeout=120)
        return Ended(self._process.returncode, out, err)

    def catches(self, number: signal.Signals) -> bool:
        """Whether it has installed a handler. SigCgt: see proc(5)."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        caught = int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16)
        return bool(caught >> (number - 1) & 1)


def batchgen(*arguments: object) -> list[str]:
    """The command, on this interpreter."""
    return [sys.executable, "-m", "batchgen", *map(str, arguments)]


def call(folder: Path, *arguments: object, **options: Any) -> Ended:
    """`batchgen ARGUMENTS…` in `folder`, to its end."""
    with Started(batchgen(*arguments), folder, **options) as process:
        return process.end()


def echo(*arguments: object) -> list[object]:
    """The arguments of a run that needs no model."""
    return ["run", *arguments, "--engine", "echo"]


def slow_echo(*arguments: object) -> list[object]:
    """One that takes 10 ms a row and commits every fifth, so that there is something to interrupt."""
    return [*echo(*arguments), "--set", "seconds=0.01", "--batch-size", 5]


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    """A JSONL file; a text stands as it is, anything else as JSON."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def prompts(count: int) -> list[dict[str, object]]:
    """Rows of different lengths."""
    return [{"id": f"row-{number}", "prompt": f"{number} " + "x" * (number * 7 % 50)} for number in range(count)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def recorded(run: Path) -> int:
    """Rows that are finished, as far as the folder of a run under way says."""
    if not (run / "run.json").exists():
        return 0
    return found(run).good


def found(run: Path) -> Status:
    """The status of a run."""
    return status(RunFolder(run))


def heartbeats(run: Path, attempt: int = 1) -> dict[int, dict[str, Any]]:
    """The last heartbeat of each rank."""
    beats = sorted((run / "attempts").glob(f"{attempt:05d}-*.json"))
    return {int(path.stem.partition("-")[2]): json.loads(path.read_text()) for path in beats}


def until(holds: Callable[[], object], process: Started | None = None) -> None:
    """Waits until `holds()`, for a minute at most and only as long as `process` runs."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        if process is not None and not process.runs():
            ended = process.end()
            raise AssertionError(f"it ended before, with {ended.code}:\n{ended.err}")
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether process `pid` still does something."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def step(task: int, tasks: int) -> dict[str, str]:
    """What srun tells a task of one step on this node."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": str(tasks),
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task),
    }
