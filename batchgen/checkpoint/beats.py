"""What the ranks' heartbeats say, as they lie in the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from batchgen.checkpoint.files import CheckpointError, read_whole
from batchgen.checkpoint.folder import RunFolder


def all_heartbeats(folder: RunFolder) -> dict[int, dict[int, dict[str, Any]]]:
    """The last heartbeat of every rank, by the attempt's number: the folder is listed once.

    An array leaves thousands of attempts, and to list their folder for each would take minutes.
    """
    paths: dict[int, list[Path]] = {}
    for path in folder.attempts.glob("*-*.json"):
        number = path.stem.partition("-")[0]
        if number.isdigit():
            paths.setdefault(int(number), []).append(path)
    return {number: beats_of(found) for number, found in paths.items()}


def beats_of(paths: Iterable[Path]) -> dict[int, dict[str, Any]]:
    """The heartbeats in these files of one attempt, by rank; damaged ones are left out."""
    beats: dict[int, dict[str, Any]] = {}
    for path in sorted(paths):
        rank = path.stem.partition("-")[2]
        try:
            beat = json.loads(read_whole(path))
        except (ValueError, FileNotFoundError):
            continue  # a power cut can empty it, since it is not synced
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        sound = isinstance(beat, dict) and has_numbers(beat, "time", "ready", "generated_tokens", "pid")
        if rank.isdigit() and sound:
            beats[int(rank)] = beat
    return beats


def has_numbers(values: Mapping[str, Any], *names: str) -> bool:
    """Whether those of `names` that are there are numbers; a damaged file may be good JSON."""
    return all(isinstance(values.get(name) or 0, int | float) for name in names)
