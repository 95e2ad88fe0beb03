"""The run folder: what was asked, its layout, and which rows are done.

    run.json                             what was asked (compared at every start), and what it ran on (`manifest`)
    grown-00001.json …                   what the input became when rows had been appended to it
    input/                               a cache: the index of the input, its unpacked text, repeated ids
    attempts/00001.json …                one start each (`attempt`)
    generations-00001-00000.jsonl …      one an attempt and stream, made exclusively, never opened for writing again
    batches-00001-00000.jsonl …          one line a finished batch: its timing, and the proof that it is finished
    generations.jsonl, errors.jsonl, timing.jsonl      written at the end (`merge`)

A batch is committed in this order: its generations, sync, its record, sync. Readers trust a generations file only up to
the last record's `end`; whatever stands behind it was in flight when something died, and is done again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchgen.checkpoint import manifest
from batchgen.checkpoint.done import Done, check_rows
from batchgen.checkpoint.files import (
    CheckpointError,
    cannot_write,
    check_can_be_folder,
    make_exclusive,
    read_json,
    to_json,
)
from batchgen.checkpoint.records import trusted
from batchgen.files import sync_folder
from batchgen.formats import Original
from batchgen.types import BatchRecord

logger = logging.getLogger(__name__)

_NAMES = "generations|errors|timing|batches|run|grown|limits|merged"
_OWN = re.compile(rf"({_NAMES})\b.*\.(jsonl|json|parquet|arrow)")
_SCRATCH = re.compile(rf"\.({_NAMES}|delivered|duplicates|scan|\d{{5}})\b.*\.\d+\.[0-9a-f]{{8}}")
GENERATIONS = ("generations.jsonl", "generations.parquet", "generations.arrow")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run on disk, over all its attempts."""

    path: Path

    @property
    def input_cache(self) -> Path:
        """Where formats keep the index of the input and unpacked text."""
        return self.path / "input"

    @property
    def attempts(self) -> Path:
        """The folder of claims and heartbeats."""
        return self.path / "attempts"

    def check_apart(self, inputs: Sequence[Path]) -> None:
        """Raises CheckpointError if an input is a file of this folder, whose place the output would take."""
        for name in inputs:
            path = os.path.realpath(name)
            if os.path.dirname(path) == os.path.realpath(self.path) and _OWN.fullmatch(os.path.basename(path)):
                raise CheckpointError(
                    f"{name} is a file that the run in {self.path} writes: its rows would be lost. "
                    "Move it, or choose another folder with -o"
                )

    def make(self) -> list[Path]:
        """Makes the folders; gives those that were not there, the innermost first.

        Raises:
            CheckpointError: something else is in the way, or there is no permission.
        """
        check_can_be_folder(self.path)
        needed = (self.input_cache, self.attempts, self.path, *self.path.parents)
        new = [folder for folder in needed if not os.path.exists(folder)]
        try:
            self.attempts.mkdir(parents=True, exist_ok=True)
            self.input_cache.mkdir(exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(13, "Permission denied")
            for folder in new:
                if folder.parent != self.path:  # the names in `path` itself are synced with run.json
                    with suppress(PermissionError):  # one may make a folder where one may not look
                        sync_folder(folder.parent)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        return new

    @contextmanager
    def scanning(self) -> Iterator[Path]:
        """A folder for what a start finds in its input; what has not been moved out of it is removed at the end.

        Raises:
            CheckpointError: it cannot be made.
        """
        scratch = self.input_cache / f".scan.{os.getpid()}.{os.urandom(4).hex()}"
        try:
            scratch.mkdir()
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def sweep(self) -> None:
        """Removes the half-written outputs and indexes of killed processes. Only for the one that holds the claim."""
        for folder in (self.path, self.input_cache):
            for scratch in folder.glob(".*"):
                if _SCRATCH.fullmatch(scratch.name):  # others are the user's, or NFS's
                    with suppress(OSError):
                        shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink()

    def check_or_create(
        self, identity: Mapping[str, object], provenance: Mapping[str, object], files: Sequence[Original] = ()
    ) -> None:
        """Records what this run is, or checks that it is the same run as the folder's.

        Args:
            identity: what decides the text; it must be equal at every start.
            provenance: what is only recorded.
            files: of the input, by which a later start sees which of them has changed.

        Raises:
            DifferentRun, Changed: the folder holds another run.
            CheckpointError: the folder holds work, and nothing says of what run.
        """
        wanted: dict[str, Any] = json.loads(json.dumps(identity))
        path = self.path / manifest.NAME
        if not path.exists():
            # Looked for again: another process may have made it and begun to work in between.
            if any(self.path.glob("*-[0-9]*-[0-9]*.jsonl")) and not path.exists():
                raise CheckpointError(
                    f"{self.path} holds generations, but no run.json, which says of what run they are. "
                    "Restore it, or start a new run with another -o"
                )
            there = [name for name in (*GENERATIONS, "errors.jsonl", "timing.jsonl") if (self.path / name).is_file()]
            if there and not path.exists():
                raise CheckpointError(
                    f"{self.path} holds {there[0]}, but no run.json: it is of no run, and this one's output would take "
                    "its place. Move it, or choose another folder with -o"
                )
            # Links of other processes may be faster than ours: then theirs is what counts.
            try:
                manifest.create(path, wanted, files, provenance)
            except OSError as error:
                raise cannot_write(self.path, error) from error
        manifest.check_same(path, wanted, provenance)

    def append_input(self, before: Mapping[str, Any], now: Mapping[str, Any], files: Sequence[Original]) -> None:
        """Records the input, to which rows have been appended since the run has had the identity `before`.

        Raises:
            CheckpointError: another start has gone on with other rows meanwhile, or it cannot be written.
        """
        try:
            manifest.append(self.path / manifest.NAME, before, now, files)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if not self.has_input(now):
            raise CheckpointError(f"another start of {self.path} has found other rows in the input. Start again")

    def has_input(self, identity: Mapping[str, Any]) -> bool:
        """Whether the run's input is that of `identity`."""
        return manifest.has_input(self.path / manifest.NAME, identity)

    def read_identity(self) -> dict[str, Any]:
        """What decides the text of this run, with the input as its last start knew it."""
        return manifest.read_identity(self.path / manifest.NAME)

    def originals(self) -> list[Original] | None:
        """The files of the input as the run began with them; None if none has begun."""
        return manifest.read_originals(self.path / manifest.NAME)

    @property
    def created(self) -> int:
        """Unix time of the first start."""
        return int(read_json(self.path / manifest.NAME)["created"])

    def limits(self, conditions: Mapping[str, object]) -> dict[int, int]:
        """The most rows that a batch may have, by its length, as attempts under the same `conditions` have learned."""
        limits: dict[int, int] = {}
        for path in sorted(self.path.glob("limits-*.json")):
            limit = read_json(path)
            if limit["conditions"] == json.loads(json.dumps(conditions)):
                length, rows = int(limit["length"]), int(limit["rows"])
                limits[length] = min(rows, limits.get(length, rows))
        return limits

    def add_limit(self, attempt: int, rank: int, conditions: Mapping[str, object], length: int, rows: int) -> None:
        """Records that, from `length` tokens up, a batch may have no more than `rows` rows."""
        limit = {"conditions": conditions, "length": length, "rows": rows}
        make_exclusive(self.path / f"limits-{attempt:05d}-{rank:05d}.json", to_json(limit))

    def has_limits_of(self, attempt: int) -> bool:
        """Whether `attempt` died of too large a batch."""
        return any(self.path.glob(f"limits-{attempt:05d}-*.json"))

    def has_manifest(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / manifest.NAME).exists()

    def merged(self) -> bool:
        """Whether the output files are there, and have all that is recorded."""
        try:
            recorded = read_json(self.path / "merged.json")
        except CheckpointError:
            return False
        there = all((self.path / name).exists() for name in recorded.get("generations", [""]))
        return there and recorded.get("batches") == self.batches()

    def batches(self) -> dict[str, int]:
        """The size in bytes of each file of batch records: it grows with every batch."""
        return {path.name: path.stat().st_size for path in sorted(self.path.glob("batches-*.jsonl"))}

    def records(self, *, verify: bool) -> Iterator[tuple[Path, BatchRecord]]:
        """All trusted batch records with their generations file, oldest attempt first.

        `verify` also reads the generations and leaves out a batch whose bytes do not match the record's checksum.
        """
        for path in sorted(self.path.glob("batches-*.jsonl")):
            generations = path.with_name(path.name.replace("batches", "generations", 1))
            yield from ((generations, record) for record in trusted(path, generations, verify))

    def done(self, rows: int, *, verify: bool = True) -> Done:
        """What is finished: a row is good if any record of it is, and failed if all of them are."""
        done = Done(bytearray(rows))
        for path, record in self.records(verify=verify):
            check_rows(path, record, rows)
            done.add(record)
        return done
