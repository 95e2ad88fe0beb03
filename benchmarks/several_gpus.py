"""The tables of several GPUs of one host.

    python benchmarks/several_gpus.py FOLDER [--seconds N] [--only WORD] [SHAPE…]

For each shape (llama-8b and bloom-7b1), over four, two and one GPUs as far as there are this many, by `batchgen bench`:
FOLDER/SHAPE-jobs with the mixed jobs of `paged`, FOLDER/SHAPE with the seed's table, and FOLDER/SHAPE-offload with 20
tokens a row and weights in host memory. Of llama-70b, over four GPUs or two, what shares a model among all.

What needs fewer GPUs than there are runs side by side, each on its own; what waits for the host's memory runs alone.
What is there already is not measured again; after `--seconds`, what still runs is stopped, and keeps its cells.
`--only` picks the commands that have the word. Speeds of two hosts do not belong into one FOLDER: bench refuses another
card, and nobody else knows.
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

SEEDS = "1,32,128,512,1024"
OFFLOADED = "1,512,2048"


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
    seeds = ("--batch-sizes", SEEDS, "--cycles", "1")
    mixed = ("--batch-sizes=", "--mixed", "1024,4096", "--cycles", "2")
    if shape == "llama-70b":
        gpus = 4 if most >= 4 else 2
        yield Job(f"{shape}-jobs", shape, gpus, ("--engines", f"paged:tp={gpus}", *mixed))
        for system in (f"paged:tp={gpus}", f"ds-inference:tp={gpus}", "ds-zero"):
            yield Job(shape, shape, gpus, ("--engines", system, *seeds))
        return
    counts = [count for count in (4, 2, 1) if count <= most]
    for count in counts:
        yield Job(f"{shape}-jobs", shape, count, ("--engines", "paged", *mixed))
        if count > 1:
            yield Job(f"{shape}-jobs", shape, count, ("--engines", "paged:tp=2", *mixed))
        yield Job(shape, shape, count, ("--engines", "ds-zero", *seeds))
        for system in ("ds-inference", "paged") if count == 1 else ("ds-inference:tp=2", "paged:tp=2"):
            yield Job(shape, shape, count, ("--engines", system, *seeds))
    for count in counts:
        words = ("--engines", "ds-zero:offload=cpu", "--batch-sizes", OFFLOADED, "--tokens", "20", "--cycles", "1")
        yield Job(f"{shape}-offload", shape, count, words, alone=True)


class Host:
    """Runs jobs on GPUs that are free."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._free = list(range(torch.cuda.device_count()))
        self._running: dict[subprocess.Popen[bytes], tuple[Job, list[int], float]] = {}
        self.failed = 0  # of those that have ended by themselves

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
            self.failed += process.returncode != 0 and not stop
            print(f"{time.monotonic() - begun:5.0f} s, exit code {process.returncode}: {words}", flush=True)
        return bool(self._running)

    def _alone(self) -> bool:
        return any(job.alone for job, _, _ in self._running.values())


def main() -> None:
    """Runs them all, in order as far as GPUs are free."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("shapes", nargs="*", default=["llama-8b", "bloom-7b1"])
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--dry-run", action="store_true", help="print the commands for four GPUs")
    given = parser.parse_intermixed_args()
    most = 4 if given.dry_run else torch.cuda.device_count()
    if not most:
        sys.exit("there is no GPU here")
    waiting = [job for shape in given.shapes for job in jobs(shape, most)]
    waiting = [job for job in waiting if any(given.only in word for word in (job.folder, *job.words))]
    waiting.sort(key=lambda job: (job.alone, -job.gpus))  # the widest first: the others fill the host side by side
    if given.dry_run:
        print("\n".join(" ".join(job.command(given.folder)[4:]) for job in waiting))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    host, deadline = Host(given.folder), time.monotonic() + given.seconds
    while (waiting or host.end()) and time.monotonic() < deadline:
        # None overtakes another: those of few GPUs would never let one of many begin.
        while waiting and host.start(waiting[0]):
            waiting.pop(0)
        time.sleep(0.2)
        host.end()
    host.end(stop=True)
    sys.exit(1 if host.failed else 0)


if __name__ == "__main__":
    main()
