"""The tables of several GPUs of one host: `python benchmarks/several_gpus.py FOLDER [--seconds N] [SHAPE…]`.

For each shape (bloom-7b1 and llama-8b), over one, two and four GPUs as far as there are so many, by `batchgen bench`:
FOLDER/SHAPE-jobs with the mixed jobs of `paged`, FOLDER/SHAPE with the seed's table, and FOLDER/SHAPE-offload with 20
tokens a row and weights in host memory. What needs fewer GPUs than there are runs side by side, each on its own; what
waits for the host's memory runs alone. What is there already is not measured again; after `--seconds`, what still runs
is stopped, and keeps its cells.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

SEEDS = "1,8,32,128,512,1024"
OFFLOADED = "1,32,512,2048"


@dataclass(frozen=True)
class Job:
    """One `batchgen bench`."""

    folder: str
    shape: str
    gpus: int
    words: tuple[str, ...]
    alone: bool = False  # nothing else may run

    def command(self, out: Path) -> list[str]:
        """As it is typed."""
        words = ["-o", str(out / self.folder), "--random-weights", self.shape, "--gpus", str(self.gpus), *self.words]
        return [sys.executable, "-W", "ignore", "-m", "batchgen", "bench", *words]


def jobs(shape: str, most: int) -> Iterator[Job]:
    """What is measured of a shape, over up to `most` GPUs, the widest first."""
    counts = [count for count in (4, 2, 1) if count <= most]
    for count in counts:
        for rows in (1024, 4096):
            words = ("--engines", "paged", "--batch-sizes=", "--mixed", str(rows), "--cycles", "3")
            yield Job(f"{shape}-jobs", shape, count, words)
        yield Job(shape, shape, count, ("--engines", "ds-zero", "--batch-sizes", SEEDS, "--cycles", "1"))
        system = "ds-inference" if count == 1 else "ds-inference:tp=2"
        yield Job(shape, shape, count, ("--engines", system, "--batch-sizes", SEEDS, "--cycles", "1"))
    for count in counts:
        words = ("--engines", "ds-zero:offload=cpu", "--batch-sizes", OFFLOADED, "--tokens", "20", "--cycles", "1")
        yield Job(f"{shape}-offload", shape, count, words, alone=True)


class Host:
    """Runs jobs on GPUs that are free."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._free = list(range(torch.cuda.device_count()))
        self._running: dict[subprocess.Popen[bytes], tuple[Job, list[int], float]] = {}

    def start(self, job: Job) -> bool:
        """Whether there was room for it."""
        if job.gpus > len(self._free) or (job.alone and self._running) or self._alone():
            return False
        mine, self._free = self._free[: job.gpus], self._free[job.gpus :]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, mine))}
        with (self._out / f"{job.folder}.log").open("ab") as log:
            process = subprocess.Popen(job.command(self._out), env=environment, stdout=log, stderr=log)
        self._running[process] = job, mine, time.monotonic()
        return True

    def end(self, *, stop: bool = False) -> bool:
        """Takes note of those that have ended, after stopping them if asked; whether any runs."""
        if stop:
            for process in self._running:
                process.send_signal(signal.SIGINT)
            for process in self._running:
                process.wait()
        for process in [one for one in self._running if one.poll() is not None]:
            job, mine, begun = self._running.pop(process)
            self._free = sorted([*self._free, *mine])
            words = " ".join(job.command(Path())[4:])
            print(f"{time.monotonic() - begun:5.0f} s, exit code {process.returncode}: {words}", flush=True)
        return bool(self._running)

    def _alone(self) -> bool:
        return any(job.alone for job, _, _ in self._running.values())


def main() -> None:
    """Runs them all, in order as far as GPUs are free."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("shapes", nargs="*", default=["bloom-7b1", "llama-8b"])
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    given = parser.parse_intermixed_args()
    waiting = [job for shape in given.shapes for job in jobs(shape, torch.cuda.device_count() or 4)]
    if given.dry_run:
        print("\n".join(" ".join(job.command(given.folder)[4:]) for job in waiting))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    host, deadline = Host(given.folder), time.monotonic() + given.seconds
    while (waiting or host.end()) and time.monotonic() < deadline:
        waiting = [job for job in waiting if not host.start(job)]
        time.sleep(0.2)
        host.end()
    host.end(stop=True)


if __name__ == "__main__":
    main()
