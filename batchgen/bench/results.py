"""The results of a bench, in a folder that a later start can go on with.

In the folder:

    bench.json         what is measured (a start that asks for something else is refused), machine and versions
    results.jsonl      a line a cell, as soon as it is there
    tables.md, results.csv, throughput.png      made from these (`tables`)
"""

from __future__ import annotations

import fcntl
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from batchgen.checkpoint import read_json, to_json
from batchgen.files import write_atomic
from batchgen.types import UserError

ARTICLE = "Incredibly Fast BLOOM Inference with DeepSpeed and Accelerate"
ARTICLE_JOB = "seed"  # what results.jsonl calls a cell of the article's table

CountMode = Literal["generated", "seed"]  # "seed": as the article counts


class BenchError(UserError):
    """The bench cannot be carried out as asked: a sentence for the person at the terminal."""


def job_name(name: str, rows: Sequence[tuple[Sequence[int], int]]) -> str:
    """What tells a job of unequal lengths from others: its name, its rows, and their tokens."""
    prompts, new = sum(len(ids) for ids, _ in rows), sum(new for _, new in rows)
    return f"{name}, {len(rows)} rows, {prompts:,} + {new:,} tokens"


@dataclass(frozen=True)
class Result:
    """One cell: a system at a batch size, or on a job."""

    system: str  # an engine and its settings, as typed
    ranks: int
    job: str  # ARTICLE_JOB, or what `job_name` says
    batch: int | None  # rows of a stream at once; None: the engine's choice
    # "ok"; "oom", also where it had to be done in smaller batches, unless the engine's pace is continuous: then that is
    # "ok", and `fits` says so; else what went wrong.
    outcome: str
    load_seconds: float | None = None
    streams: int = 0
    rows: int = 0  # of all streams
    fits: int | None = None  # rows of the largest batch: most of a stream in work at once; None: unknown
    generated: int = 0  # tokens of one cycle and all streams, up to and with the end of sequence
    counted_by_seed: int = 0  # as the article counts: with the padding behind a row's end
    seconds: list[float] = field(default_factory=list)  # of each cycle, tokenising and decoding included
    prefill_seconds: float | None = None
    floor_seconds: float | None = None  # what a cycle takes at least on this machine
    device_bytes: int | None = None  # most on one device
    host_bytes: int | None = None  # most of one rank, what it shares with others included

    @property
    def key(self) -> tuple[object, ...]:
        """What the cell is, whatever came of it."""
        return self.system, self.ranks, self.job, self.batch

    @property
    def median(self) -> float:
        """Seconds of a cycle."""
        return statistics.median(self.seconds)

    @property
    def decode_steps(self) -> int:
        """Of a row, in a cycle, behind its first token; 0 where prefill was not timed by itself."""
        return 0 if self.prefill_seconds is None else self.counted_by_seed // max(self.rows, 1) - 1

    @property
    def step_seconds(self) -> float:
        """Seconds of a decode step."""
        return (self.median - (self.prefill_seconds or 0.0)) / max(self.decode_steps, 1)

    def tokens(self, mode: CountMode) -> int:
        """Tokens of a cycle."""
        return self.counted_by_seed if mode == "seed" else self.generated

    def per_second(self, mode: CountMode = "generated") -> float:
        """Tokens a second."""
        return self.tokens(mode) / self.median

    def milliseconds(self, mode: CountMode = "generated") -> float:
        """Milliseconds of a token: the figure of the article's table."""
        return 1000 * self.median / self.tokens(mode)


@dataclass(frozen=True, slots=True)
class Folder:
    """Where a bench is kept."""

    path: Path

    def check_or_create(self, identity: Mapping[str, Any]) -> None:
        """Records what is measured, or checks that it is what is measured here already.

        Raises:
            BenchError: it is not.
        """
        wanted = json.loads(json.dumps(identity))

        def check(recorded: Mapping[str, Any]) -> Mapping[str, Any]:
            before = recorded.get("asked", wanted)
            differing = [name for name in {**before, **wanted} if before.get(name) != wanted.get(name)]
            if differing:
                changes = "; ".join(f"{name} was {before.get(name)}, now {wanted.get(name)}" for name in differing)
                raise BenchError(f"{self.path} holds another bench: {changes}. Choose another folder with -o")
            return {"asked": wanted}

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._change(check)
        except OSError as error:
            raise BenchError(f"cannot write {self.path}: {error.strerror or error}") from error

    def describe(self, provenance: Mapping[str, Any]) -> None:
        """Records what it ran on."""
        self._change(lambda recorded: provenance)

    def remember(self, command: str) -> None:
        """Records a command that has added to it."""

        def add_command(recorded: Mapping[str, Any]) -> Mapping[str, Any]:
            return {"commands": [*(other for other in recorded.get("commands", []) if other != command), command]}

        self._change(add_command)

    def _change(self, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        """Other benches, on other GPUs of this host, may add to the same folder meanwhile."""
        path = self.path / "bench.json"
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            recorded = read_json(path) if path.exists() else {}
            write_atomic(path, to_json({**recorded, **change(recorded)}))
        finally:
            os.close(folder)

    def read_manifest(self) -> dict[str, Any]:
        """What is measured, and on what.

        Raises:
            CheckpointError: this is no bench.
        """
        return read_json(self.path / "bench.json")

    def results(self) -> list[Result]:
        """All cells so far; of one that was measured twice, the last."""
        path = self.path / "results.jsonl"
        results: dict[tuple[object, ...], Result] = {}
        names = {column.name for column in fields(Result)}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            values = json.loads(line)
            result = Result(**{name: value for name, value in values.items() if name in names})
            results[result.key] = result
        return list(results.values())

    def add(self, result: Result) -> None:
        """Keeps a cell."""
        with (self.path / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
