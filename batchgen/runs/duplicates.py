"""Ids that several rows of an input have."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from batchgen.checkpoint import CheckpointError, Damaged, read_json, to_json
from batchgen.files import write_atomic
from batchgen.formats.input import Input
from batchgen.requests.row_ids import IdPrefix, own_id


def find_duplicates(source: Input, cache: Path, into: Path | None, prefix: IdPrefix | None) -> dict[int, str]:
    """Row number of each repeated id, and the place of the row that has it first.

    They are found once for the whole input: a rank that sees only its own rows could not find them.

    Args:
        cache: the run's, where an earlier start has left them.
        into: where they are left now; None: they must be in the cache.

    Raises:
        CheckpointError: they are not there, or cannot be written.
    """
    path = cache / "duplicates.json"
    try:
        recorded = read_json(path) if path.exists() else {}
    except Damaged:
        recorded = {}
    wanted, there = [source.digest, prefix], [recorded.get("input"), recorded.get("id_prefix")]
    if there != wanted or recorded.get("checksum") != _checksum(recorded.get("rows")):
        if into is None:
            raise CheckpointError(f"{path} is of another input, or damaged; start again")
        duplicates = {str(row): first for row, first in source.duplicates(own_id, by_file=prefix is not None).items()}
        recorded = {"input": source.digest, "id_prefix": prefix, "rows": duplicates, "checksum": _checksum(duplicates)}
        try:
            write_atomic(into / path.name, to_json(recorded))
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}. Nothing has started") from error
    return {int(row): str(first) for row, first in recorded["rows"].items()}


def _checksum(rows: object) -> int:
    return zlib.crc32(json.dumps(rows).encode())
