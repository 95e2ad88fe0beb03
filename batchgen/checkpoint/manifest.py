"""`run.json`: what a run is, as its first start has recorded it; it is compared at every later one.

It alone says what a run began with. The index of the input is a cache, which a power cut may take. Where rows have been
appended to the input since, `grown-00001.json` and so on say what the input is now. Such a file is made exclusively, so
that one of several starts does it, and `run.json` is replaced after it: whoever reads both in between is right as well.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batchgen.checkpoint.files import CheckpointError, DifferentRun, make_exclusive, read_json, to_json
from batchgen.files import write_atomic
from batchgen.formats import Changed, Original
from batchgen.formats.input import listed, names_of

logger = logging.getLogger(__name__)

NAME = "run.json"
_OF_INPUT = ("input", "rows")  # of the identity


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
    content = {"asked": identity, "inputs": _listed(files), "created": int(time.time()), "first_start": provenance}
    make_exclusive(path, to_json(content))


def append(path: Path, before: Mapping[str, Any], now: Mapping[str, Any], files: Sequence[Original]) -> None:
    """Records that rows have been appended to the input, unless another process has done so meanwhile.

    Args:
        before: the identity that this start has compared: nothing is recorded if the run has another one by now.
        now: the identity with the rows that have been appended.
        files: the files of the input as they are now.

    Raises:
        OSError: it cannot be written.
    """
    content = _read(path)
    recorded = content["asked"]
    if not _is_input_of(recorded, before):
        return
    number = int(content.get("grown", 0)) + 1
    asked = {**recorded, **{name: now[name] for name in _OF_INPUT}}
    grown = {"asked": asked, "inputs": _listed(files), "grown": number}
    history = {"rows_before": recorded["rows"], "appended": int(time.time())}
    if make_exclusive(_growth(path, number), to_json(grown | history)):
        rows = int(now["rows"]) - int(recorded["rows"])
        if rows:
            logger.info("%s been appended to the input", "1 row has" if rows == 1 else f"{rows} rows have")
        write_atomic(path, to_json(content | grown))


def has_input(path: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the run's input is that of `identity`."""
    return _is_input_of(read_identity(path), identity)


def _is_input_of(recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    return all(recorded.get(name) == identity.get(name) for name in _OF_INPUT)


def _listed(files: Sequence[Original]) -> list[dict[str, Any]]:
    """What is known of each file; an older version reads `name` and `digest`."""
    return [{name: value for name, value in file._asdict().items() if value not in (None, "")} for file in files]


def _growth(path: Path, number: int) -> Path:
    return path.with_name(f"grown-{number:05d}.json")


def _read(path: Path) -> dict[str, Any]:
    """`run.json`, with what has been appended to the input."""
    content = read_json(path)
    while (later := _growth(path, int(content.get("grown", 0)) + 1)).exists():
        content |= {name: value for name, value in read_json(later).items() if name in ("asked", "inputs", "grown")}
    return content


def check_same(path: Path, identity: Mapping[str, Any], provenance: Mapping[str, object]) -> None:
    """Compares this start with the run in the folder.

    Raises:
        Changed: the input is another one.
        DifferentRun: something else differs; the message names each field.
    """
    recorded = _read(path).get("asked", {})
    if "input" in recorded and recorded["input"] != identity.get("input"):
        files = provenance.get("input_files")
        raise Changed(listed(files if isinstance(files, list) and files else ["the input"]))
    recorded, identity = _flatten(recorded), _flatten(identity)
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
    identity = _read(path).get("asked")
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
    content = _read(path)
    try:
        if "inputs" in content:
            return [_original(entry) for entry in content["inputs"]]
        # Of an older version, which recorded where the files lay and one digest of all of them.
        files = content["first_start"]["input_files"]
        return [Original(name, "") for name in names_of([Path(file) for file in files])]
    except (KeyError, TypeError):
        return None


def _original(entry: Mapping[str, Any]) -> Original:
    rows, size = entry.get("rows"), entry.get("size")
    is_known = isinstance(rows, int) and isinstance(size, int)
    text_digest = str(entry.get("text_digest", ""))
    name, digest = str(entry["name"]), str(entry["digest"])
    return Original(name, digest, rows, size, text_digest) if is_known else Original(name, digest)


def _flatten(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked, with each adapter as a field of its own: of two long objects a sentence shows the beginnings."""
    adapters = identity.get("adapters")
    if not isinstance(adapters, Mapping):
        return dict(identity)
    others = {name: value for name, value in identity.items() if name != "adapters"}
    return others | {f"adapters.{name}": value for name, value in adapters.items()}


def _format_value(identity: Mapping[str, Any], name: str) -> str:
    text = json.dumps(identity[name], ensure_ascii=False) if name in identity else "not set"
    return text if len(text) <= 80 else text[:77] + "…"
