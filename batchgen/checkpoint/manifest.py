"""`run.json`: what a run is, written once by its first start and compared at every later one.

It alone says what a run began with. The index of the input is a cache, which a power cut may take.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batchgen.checkpoint.files import AskedDifferently, CheckpointError, make_exclusive, read_json, to_json
from batchgen.formats import Changed, Original
from batchgen.formats.input import listed, names_of

NAME = "run.json"


def create(path: Path, asked: Mapping[str, object], files: Sequence[Original], facts: Mapping[str, object]) -> None:
    """Writes it, unless another process has done so meanwhile. May raise OSError."""
    inputs = [one._asdict() for one in files]
    make_exclusive(path, to_json({"asked": asked, "inputs": inputs, "created": int(time.time()), "first_start": facts}))


def compare(path: Path, asked: Mapping[str, Any], facts: Mapping[str, object]) -> None:
    """Raises Changed, where the input is another one, or AskedDifferently unless the run was asked like this."""
    known = read_json(path).get("asked", {})
    if "input" in known and known["input"] != asked.get("input"):
        files = facts.get("input_files")
        raise Changed(listed(files if isinstance(files, list) and files else ["the input"]))
    differing = [name for name in {**known, **asked} if known.get(name) != asked.get(name)]
    if differing:
        changes = "; ".join(f"{name} was {_shown(known, name)}, now {_shown(asked, name)}" for name in differing)
        raise AskedDifferently(
            f"{path.parent} holds a run that was asked differently: {changes}. Start a new run with another -o"
        )


def read_asked(path: Path) -> dict[str, Any]:
    """What was asked.

    Raises:
        CheckpointError: it is not there, or does not say so.
    """
    asked = read_json(path).get("asked")
    if not isinstance(asked, dict) or not isinstance(asked.get("rows"), int):
        raise CheckpointError(f"{path} is damaged: it does not say what was asked")
    return asked


def read_originals(path: Path) -> list[Original] | None:
    """The files that the run has begun with; None if it has not begun, or does not say.

    Raises:
        CheckpointError: it cannot be read, or is damaged.
    """
    if not path.exists():
        return None
    content = read_json(path)
    try:
        if "inputs" in content:
            return [Original(str(one["name"]), str(one["digest"])) for one in content["inputs"]]
        # Of an older version, which recorded where the files lay and one digest of all of them.
        files = content["first_start"]["input_files"]
        return [Original(name, "") for name in names_of([Path(file) for file in files])]
    except (KeyError, TypeError):
        return None


def _shown(asked: Mapping[str, Any], name: str) -> str:
    text = json.dumps(asked[name], ensure_ascii=False) if name in asked else "not set"
    return text if len(text) <= 80 else text[:77] + "…"
