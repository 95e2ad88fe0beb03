"""A folder saved by `datasets.Dataset.save_to_disk`: Arrow streams, and `state.json` that says in which order.

Read with pyarrow alone: all columns as they are stored, whatever format the dataset was set to, pictures undecoded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchgen.formats import Block, InputError, Scan, Source, blocks_of
from batchgen.formats._record_batches import DAMAGE, check_names, check_stream_ends


class Folder(Source):
    """One dataset; `line` is its row, counted from 1."""

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Any folder: what is wrong with one that `datasets` did not save is said when it is opened."""
        return path.is_dir()

    def files(self) -> list[Path]:
        """The Arrow files, in the order of the rows."""
        if not self._files:
            raise InputError(f"{self.path} is a dataset without files")
        return self._files

    @cached_property
    def _files(self) -> list[Path]:
        splits = self.path / "dataset_dict.json"
        if splits.exists():
            names = _read_json(splits).get("splits")
            paths = ", ".join(str(self.path / str(name)) for name in (names if isinstance(names, list) else ()))
            raise InputError(f"{self.path} holds several splits. Name one of them instead: {paths or 'its folders'}")
        if not (self.path / "state.json").exists():
            raise InputError(
                f"{self.path} is a folder, but not one that datasets saved: it has no state.json. "
                f"Name the files in it instead, such as '{self.path}/*.jsonl'"
            )
        state = _read_json(self.path / "state.json")
        if state.get("_indices_data_files"):
            raise InputError(
                f"{self.path} was saved by an old version of datasets, with its rows in another order than its files "
                "have. Load it with that version, call flatten_indices() and save it again"
            )
        try:
            names = [file["filename"] for file in state["_data_files"]]
            if not all(os.fsencode(name).strip(b"./") and "\0" not in name for name in names):
                raise ValueError("a name of no file")
            return [self.path / name for name in names]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.path / 'state.json'} does not name the files of the dataset") from error

    def scan(self) -> Scan:
        """Reads all bytes for the digest, then every record batch."""
        digest = self.digest()
        size = sum(path.stat().st_size for path in self._files)
        for path in self._files:
            with _mapped(path) as file:
                check_stream_ends(file)
        with _open_table(self._files[0]) as reader:
            check_names(reader.schema)
        rows = sum(block.rows for block in self.blocks())
        return Scan(digest, size, rows)

    def digest(self) -> str:
        """Over the names of the files and what they hold."""
        digest = hashlib.sha256()
        for path in self._files:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(json.dumps([path.name, content]).encode())
        return digest.hexdigest()

    def schema(self) -> pa.Schema:
        """The types of the columns."""
        with _open_table(self._files[0]) as reader:
            return reader.schema

    def blocks(self) -> Iterator[Block]:
        """The record batches of all files."""
        schema = self.schema()
        for path in self._files:
            with _open_table(path) as reader:
                if not reader.schema.equals(schema):
                    raise InputError(f"{path} has other columns than {self._files[0].name}. Save the dataset again")
                yield from blocks_of(reader)


@contextmanager
def _open_table(path: Path) -> Iterator[Any]:
    with _mapped(path) as file, pa.ipc.open_stream(file) as reader:
        yield reader


@contextmanager
def _mapped(path: Path) -> Iterator[pa.NativeFile]:
    try:
        with pa.memory_map(os.fsencode(path)) as file:
            yield file
    except DAMAGE as error:
        raise InputError(f"{path} cannot be read as an Arrow stream: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: it holds no object")
    return value
