"""The bench: the seed's two tables and jobs of unequal lengths, for any engine and model, on this machine.

One process group a system and a kind of work, so that what dies is a cell and not the end; a bench goes on with the
cells that it lacks. `compare` puts two of them beside each other.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchgen import engine, launch
from batchgen.bench.results import BenchError, Folder, Result
from batchgen.stop import Stop

logger = logging.getLogger(__name__)

OUT_OF_STEP = 75  # exit code of ranks that could not go on together


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
        engine.parse_options(engine.find(name), settings)
        return cls(text, name, settings, dtype)


@dataclass(frozen=True)
class Bench:
    """What is measured."""

    systems: Sequence[System]
    model: str  # a folder
    dtype: str
    batches: Sequence[int]  # of the seed's batches; empty: none
    tokens: int = 100
    cycles: int = 5
    job: str | None = None  # the name of a job of unequal lengths; None: none
    job_rows: Sequence[tuple[Sequence[int], int]] = ()  # token ids and new tokens of each of its rows
    ranks: int = 1
    cache: str = ""


def run(bench: Bench, folder: Folder, environment: Mapping[str, str], stop: Stop) -> list[Result]:
    """Measures what is not there yet; gives all results.

    Raises:
        BenchError: a system cannot run at all.
    """
    for system in bench.systems:
        known = {result.key: result for result in folder.results()}
        wanted = [batch for batch in bench.batches if (system.text, bench.ranks, "seed", batch) not in known]
        mine = [one for one in known.values() if one.key[:3] == (system.text, bench.ranks, "seed")]
        ended = any(one.outcome != "ok" for one in mine)
        if wanted and not ended and not stop():
            logger.info("%s: batches of %s", system.text, ", ".join(map(str, wanted)))
            for result in _measured(bench, system, wanted, None, environment, stop, folder):
                folder.add(result)
        if bench.job is not None and (system.text, bench.ranks, bench.job, None) not in known and not stop():
            logger.info("%s: %s", system.text, bench.job)
            for result in _measured(bench, system, [], bench.job, environment, stop, folder):
                folder.add(result)
    return folder.results()


def _measured(
    bench: Bench,
    system: System,
    batches: Sequence[int],
    job: str | None,
    environment: Mapping[str, str],
    stop: Stop,
    folder: Folder,
) -> Iterable[Result]:
    """Starts the ranks once, and puts together what they have found."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=folder.path) as scratch:
        rows = Path(scratch, "job.json")
        if job is not None:
            rows.write_text(json.dumps([[list(ids), new] for ids, new in bench.job_rows]), encoding="utf-8")
        task = {
            "engine": system.engine,
            "settings": list(system.settings),
            "model": bench.model,
            "dtype": system.dtype or bench.dtype,
            "batches": list(batches),
            "tokens": bench.tokens,
            "cycles": bench.cycles,
            "job": None if job is None else str(rows),
            "folder": scratch,
            "cache": bench.cache,
        }
        path = Path(scratch, "task.json")
        path.write_text(json.dumps(task), encoding="utf-8")
        codes = launch.start_ranks(None, ["bench", "worker", str(path)], bench.ranks, stop, environment)
        if stop.signal is None:
            stop.reason = None  # that a rank died is a finding
        found = [_lines(Path(scratch, f"rank-{rank}.jsonl")) for rank in range(bench.ranks)]
    if 4 in codes:
        raise BenchError(f"{system.text} cannot run here; it says above why")
    _describe(folder, found)
    for result in _cells(system, bench.ranks, batches, job, found, codes):
        if result.outcome == "ok" or not stop():  # what is missing, since we have ended the ranks, is no finding
            yield result


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _describe(folder: Folder, found: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    machines = [line["machine"] for lines in found for line in lines if "machine" in line]
    if machines:
        name, bandwidth, arithmetic = machines[0]
        folder.describe({"machine": {"name": name, "bytes_per_second": bandwidth, "operations_per_second": arithmetic}})


def _cells(
    system: System,
    ranks: int,
    batches: Sequence[int],
    job: str | None,
    found: Sequence[Sequence[Mapping[str, Any]]],
    codes: Sequence[int],
) -> Iterable[Result]:
    """A result a cell: the slowest rank's seconds, all streams' tokens. The first that is missing they died of."""
    loads = [line for lines in found for line in lines if "load_seconds" in line]
    general: dict[str, Any] = {
        "system": system.text,
        "ranks": ranks,
        "job": job or "seed",
        "load_seconds": max((line["load_seconds"] for line in loads), default=None),
        "streams": loads[0]["streams"] if loads else 0,
    }
    cells: Sequence[int | None] = batches or [None]
    for batch in cells:
        lines = [line for each in found for line in each if "outcome" in line and line["batch"] == batch]
        if len(lines) < ranks:
            # A rank that is killed for memory says nothing.
            outcome = "oom" if any(code in (OUT_OF_STEP, -9, 137) for code in codes) else f"exit code {max(codes)}"
            yield Result(batch=batch, outcome=outcome, **general)
            return
        if any(line["outcome"] != "ok" for line in lines):
            yield Result(batch=batch, outcome="oom", fits=min(line["fits"] for line in lines), **general)
            return
        yield _together(batch, lines, general)


def _together(batch: int | None, lines: Sequence[Mapping[str, Any]], general: Mapping[str, Any]) -> Result:
    def most(name: str) -> Any:
        return max((line[name] for line in lines if line.get(name) is not None), default=None)

    def total(name: str) -> int:
        return sum(line[name] for line in lines)

    return Result(
        batch=batch,
        outcome="ok",
        rows=total("rows"),
        fits=most("fits"),
        generated=total("generated"),
        counted_by_seed=total("counted_by_seed"),
        seconds=[max(cycle) for cycle in zip(*(line["seconds"] for line in lines), strict=True)],
        prefill_seconds=most("prefill_seconds"),
        floor_seconds=most("floor_seconds"),
        device_bytes=most("device_bytes"),
        host_bytes=most("host_bytes"),
        **general,
    )


def asked(bench: Bench, model: str) -> dict[str, Any]:
    """What two starts of one bench must have in common; systems, batches, ranks and jobs may be added."""
    values = dataclasses.asdict(dataclasses.replace(bench, job_rows=()))
    for name in ("systems", "batches", "ranks", "cache", "job", "job_rows"):
        del values[name]
    return values | {"model": model}
