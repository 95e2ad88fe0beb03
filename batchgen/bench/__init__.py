"""The bench: an article's two tables and workloads of unequal lengths, for any engine and model, on this machine.

One process group a system and a kind of work, so that what dies is a cell and not the end; a bench goes on with the
cells that it lacks. `compare` puts two of them beside each other.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchgen import engines
from batchgen.bench.results import ARTICLE_JOB, BenchError, Folder, Result
from batchgen.runs import launcher
from batchgen.runs.stop import Stop
from batchgen.types import ExitCode

logger = logging.getLogger(__name__)

_SAY_LITTLE = (1, -signal.SIGTERM, 0)  # of one that missed another, that the starter has ended, that had no trouble


@dataclass(frozen=True)
class System:
    """An engine with settings, as it is typed: ENGINE[:NAME=VALUE…]. `dtype` is one of them."""

    text: str
    engine: str
    settings: tuple[str, ...]
    dtype: str | None

    @classmethod
    def parse(cls, text: str) -> System:
        """The system that is written `text`.

        Raises:
            EngineError: there is no such engine or setting.
        """
        name, *parts = text.split(":")
        dtype = next((part.removeprefix("dtype=") for part in parts if part.startswith("dtype=")), None)
        settings = tuple(part for part in parts if not part.startswith("dtype="))
        engines.parse_options(engines.find(name), settings)
        return cls(text, name, settings, dtype)


@dataclass(frozen=True)
class Job:
    """Rows of unequal lengths."""

    name: str  # as `results.job_name` has it
    rows: Sequence[tuple[Sequence[int], int]]  # token ids and new tokens of each


@dataclass(frozen=True)
class Bench:
    """What is measured."""

    systems: Sequence[System]
    model: str  # a folder
    dtype: str
    batches: Sequence[int]  # the batch sizes of the article's table; empty: it is not measured
    tokens: int = 100
    cycles: int = 5
    jobs: Sequence[Job] = ()
    ranks: int = 1
    cache: str = ""
    command: str = ""  # as it was typed
    provenance: Mapping[str, object] = field(default_factory=dict)  # kept with the results: versions and date


def run(bench: Bench, folder: Folder, environment: Mapping[str, str], stop: Stop) -> list[Result]:
    """Measures what is not there yet; gives all results.

    Raises:
        BenchError: a system cannot run at all.
    """
    launch = _Launch(bench, folder, environment, stop)
    for system in bench.systems:
        measured = [
            result for result in folder.results() if (result.system, result.ranks) == (system.text, bench.ranks)
        ]
        settled = {
            (result.job, result.batch) for result in measured if result.outcome in ("ok", "oom")
        }  # a crash may not come again
        lost = [
            result.batch
            for result in measured
            if result.job == ARTICLE_JOB and result.outcome == "oom" and result.batch is not None
        ]
        least = min(lost, default=math.inf)
        batches = [batch for batch in bench.batches if (ARTICLE_JOB, batch) not in settled and batch < least]
        jobs = [job for job in bench.jobs if (job.name, None) not in settled]
        for some, others in ((batches, []), ([], jobs)):
            if (some or others) and not stop():
                logger.info("%s: %s", system.text, _named(some, others))
                for result in launch.measure(system, some, others):
                    folder.add(result)
    return folder.results()


def _named(batches: Sequence[int], jobs: Sequence[Job]) -> str:
    return "; ".join(job.name for job in jobs) or f"batches of {', '.join(map(str, batches))}"


@dataclass(frozen=True)
class _Launch:
    """What every launch of ranks in one bench has in common."""

    bench: Bench
    folder: Folder
    environment: Mapping[str, str]
    stop: Stop

    def measure(self, system: System, batches: Sequence[int], jobs: Sequence[Job]) -> Iterable[Result]:
        """Starts the ranks once, and puts together what they have found."""
        with tempfile.TemporaryDirectory(prefix="bench-", dir=self.folder.path) as scratch:
            task = {
                "engine": system.engine,
                "settings": list(system.settings),
                "model": self.bench.model,
                "dtype": system.dtype or self.bench.dtype,
                "batches": list(batches),
                "tokens": self.bench.tokens,
                "cycles": self.bench.cycles,
                "jobs": {job.name: [[list(ids), new] for ids, new in job.rows] for job in jobs},
                "folder": scratch,
                "cache": self.bench.cache,
                "machine": self.folder.read_manifest().get("machine", {}).get("name"),
            }
            path = Path(scratch, "task.json")
            path.write_text(json.dumps(task), encoding="utf-8")
            command = ["bench", "worker", str(path)]
            codes = launcher.start_ranks(None, command, self.bench.ranks, self.stop, self.environment)
            if self.stop.signal is None:
                self.stop.reason = None  # that a rank died is a finding
            lines_by_rank = [_lines(Path(scratch, f"rank-{rank}.jsonl")) for rank in range(self.bench.ranks)]
        _describe(self.bench, self.folder, lines_by_rank)
        cells: list[tuple[str, int | None]] = [(ARTICLE_JOB, batch) for batch in batches]
        cells += [(job.name, None) for job in jobs]
        for result in _cells(system, self.bench.ranks, cells, lines_by_rank, codes):
            # What is missing because we have ended the ranks is no finding.
            if result.outcome == "ok" or not self.stop():
                yield result
        if ExitCode.CANNOT_RUN in codes:  # what came before is measured all the same
            raise BenchError(f"{system.text} cannot run here; it says above why")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _describe(bench: Bench, folder: Folder, lines_by_rank: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """What has measured these, and where."""
    lines = [line for lines in lines_by_rank for line in lines]
    provenance = dict(bench.provenance)
    for name, bandwidth, arithmetic in [line["machine"] for line in lines if "machine" in line][:1]:
        provenance["machine"] = {"name": name, "bytes_per_second": bandwidth, "operations_per_second": arithmetic}
    for size in [line["size"] for line in lines if "size" in line][:1]:
        provenance["model_size"] = size
    if any("outcome" in line for line in lines):
        folder.describe(provenance)
        folder.remember(bench.command)


def _cells(
    system: System,
    ranks: int,
    cells: Sequence[tuple[str, int | None]],
    lines_by_rank: Sequence[Sequence[Mapping[str, Any]]],
    codes: Sequence[int],
) -> Iterable[Result]:
    """A result a cell: the slowest rank's seconds, all streams' tokens. The first that is missing they died of.

    A rank that has refused to go on leaves no such cell: nothing was found out about it.
    """
    loads = [line for lines in lines_by_rank for line in lines if "load_seconds" in line]
    for job, batch in cells:
        general: dict[str, Any] = {
            "system": system.text,
            "ranks": ranks,
            "job": job,
            "batch": batch,
            "load_seconds": max((line["load_seconds"] for line in loads), default=None),
            "streams": loads[0]["streams"] if loads else 0,
        }
        of_cell = [
            [line for line in each if (line.get("job"), line.get("batch")) == (job, batch)] for each in lines_by_rank
        ]
        lines = [of_rank[-1] for of_rank in of_cell if of_rank]
        if len(lines) < ranks:
            if ExitCode.CANNOT_RUN in codes:
                return
            # A rank that is killed for memory says nothing; one that has said that it has none may end in any way.
            has_reported = any(line["outcome"] == "oom" for line in lines)
            killed = any(code in (ExitCode.RESUMABLE, -9, 137) for code in codes)
            yield Result(outcome="oom" if has_reported or killed else f"exit code {_cause(codes)}", **general)
            return
        if any(line["outcome"] != "ok" for line in lines):
            fits = [line["fits"] for line in lines if line["fits"] is not None]
            yield Result(outcome="oom", fits=min(fits, default=None), **general)
            return
        yield _together(lines, general)


def _cause(codes: Sequence[int]) -> int:
    """The exit code of the rank that the others died of, as far as codes tell: a signal's before any other."""
    telling = [code for code in codes if code not in _SAY_LITTLE]
    signals = [code for code in telling if code < 0]
    return next(iter([*signals, *telling, *(code for code in _SAY_LITTLE if code in codes)]), 0)


def _together(lines: Sequence[Mapping[str, Any]], general: Mapping[str, Any]) -> Result:
    def largest(name: str) -> Any:
        return max((line[name] for line in lines if line.get(name) is not None), default=None)

    def total(name: str) -> int:
        return sum(line[name] for line in lines)

    cycles = zip(*(line["seconds"] for line in lines), strict=False)  # ranks that were stopped may have done one more
    return Result(
        outcome="ok",
        rows=total("rows"),
        fits=largest("fits"),
        generated=total("generated"),
        counted_by_seed=total("counted_by_seed"),
        seconds=[max(cycle) for cycle in cycles],
        prefill_seconds=largest("prefill_seconds"),
        floor_seconds=largest("floor_seconds"),
        device_bytes=largest("device_bytes"),
        host_bytes=largest("host_bytes"),
        **general,
    )


def identity(bench: Bench, model: str) -> dict[str, Any]:
    """What two starts of one bench must have in common; systems, batch sizes, ranks and jobs may be added."""
    common = {"dtype": bench.dtype, "tokens": bench.tokens, "cycles": bench.cycles}
    return common | {"model": model}
