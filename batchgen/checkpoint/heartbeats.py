"""Reads the heartbeats that the ranks have written into the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from batchgen.checkpoint.files import CheckpointError, read_whole
from batchgen.checkpoint.folder import RunFolder


def all_heartbeats(folder: RunFolder) -> dict[int, dict[int, dict[str, Any]]]:
    """The last heartbeat of every rank of every attempt, by the attempt's number and the rank.

    The folder is listed once: an array leaves thousands of attempts, and listing it for each would take minutes.
    """
    paths: dict[int, list[Path]] = {}
    for path in folder.attempts.glob("*-*.json"):
        number = path.stem.partition("-")[0]
        if number.isdigit():
            paths.setdefault(int(number), []).append(path)
    return {number: read_heartbeats(files) for number, files in paths.items()}


def read_heartbeats(paths: Iterable[Path]) -> dict[int, dict[str, Any]]:
    """The heartbeats in these files of one attempt, by rank; damaged ones are left out."""
    heartbeats: dict[int, dict[str, Any]] = {}
    for path in sorted(paths):
        rank = path.stem.partition("-")[2]
        try:
            heartbeat = json.loads(read_whole(path))
        except (ValueError, FileNotFoundError):
            continue  # a power cut can empty it, since it is not synced
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        is_sound = isinstance(heartbeat, dict) and has_numbers(heartbeat, "time", "ready", "generated_tokens", "pid")
        if rank.isdigit() and is_sound:
            heartbeats[int(rank)] = heartbeat
    return heartbeats


def has_numbers(values: Mapping[str, Any], *names: str) -> bool:
    """Whether each value of `names` that is there is a number; a damaged file may still be valid JSON."""
    return all(isinstance(values.get(name) or 0, int | float) for name in names)
