"""`run.json`: what a run is, written once by its first start and compared at every later one.

It alone says what a run began with. The index of the input is a cache, which a power cut may take.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batchgen.checkpoint.files import CheckpointError, DifferentRun, make_exclusive, read_json, to_json
from batchgen.formats import Changed, Original
from batchgen.formats.input import listed, names_of

NAME = "run.json"


def create(
    path: Path, identity: Mapping[str, object], files: Sequence[Original], provenance: Mapping[str, object]
) -> None:
    """Writes the manifest, unless another process has done so meanwhile.

    Args:
        identity: what decides the text of the run, and is compared at every start.
        files: the files of the input, as the run begins with them.
        provenance: what the first start ran on; it is only recorded.

    Raises:
        OSError: it cannot be written.
    """
    inputs = [file._asdict() for file in files]
    content = {"asked": identity, "inputs": inputs, "created": int(time.time()), "first_start": provenance}
    make_exclusive(path, to_json(content))


def check_same(path: Path, identity: Mapping[str, Any], provenance: Mapping[str, object]) -> None:
    """Compares this start with the run in the folder.

    Raises:
        Changed: the input is another one.
        DifferentRun: something else differs; the message names each field.
    """
    recorded = read_json(path).get("asked", {})
    if "input" in recorded and recorded["input"] != identity.get("input"):
        files = provenance.get("input_files")
        raise Changed(listed(files if isinstance(files, list) and files else ["the input"]))
    differing = [name for name in {**recorded, **identity} if recorded.get(name) != identity.get(name)]
    if differing:
        changes = "; ".join(
            f"{name} was {_format_value(recorded, name)}, now {_format_value(identity, name)}" for name in differing
        )
        raise DifferentRun(
            f"{path.parent} holds a run that was asked differently: {changes}. Start a new run with another -o"
        )


def read_identity(path: Path) -> dict[str, Any]:
    """What decides the text of the run, as its first start recorded it.

    Raises:
        CheckpointError: it is not there, or does not say so.
    """
    identity = read_json(path).get("asked")
    if not isinstance(identity, dict) or not isinstance(identity.get("rows"), int):
        raise CheckpointError(f"{path} is damaged: it does not say what was asked")
    return identity


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
            return [Original(str(entry["name"]), str(entry["digest"])) for entry in content["inputs"]]
        # Of an older version, which recorded where the files lay and one digest of all of them.
        files = content["first_start"]["input_files"]
        return [Original(name, "") for name in names_of([Path(file) for file in files])]
    except (KeyError, TypeError):
        return None


def _format_value(identity: Mapping[str, Any], name: str) -> str:
    text = json.dumps(identity[name], ensure_ascii=False) if name in identity else "not set"
    return text if len(text) <= 80 else text[:77] + "…"
