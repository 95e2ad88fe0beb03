"""The folder of an adapter, by its files: whether it is one, and what tells it from another. Standard library only."""

from __future__ import annotations

import hashlib
from pathlib import Path

from batchgen.models.definition.errors import ModelError
from batchgen.models.definition.files import check_file
from batchgen.models.definition.folders import snapshot_in

CONFIG = "adapter_config.json"
TENSORS = ("adapter_model.safetensors", "adapter_model.bin")


def find_adapter(name: str) -> Path:
    """The folder that `--adapter` names, absolute; of a folder of the hub's cache, the snapshot in it.

    Raises:
        ModelError: there is none, or it holds no adapter.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        what = "is a file; give the folder that holds it" if path.exists() else "is not there"
        raise ModelError(f"the adapter {name} {what}. --adapter takes a folder with {CONFIG} and {TENSORS[0]}")
    folder = snapshot_in(path.resolve(), CONFIG)
    if not check_file(folder / CONFIG):
        whole = "; it holds a whole model, which --model takes" if (folder / "config.json").exists() else ""
        raise ModelError(f"{folder} holds no adapter: there is no {CONFIG} in it{whole}")
    return folder


def find_tensors(folder: Path) -> Path:
    """The file with the tensors of the adapter in `folder`.

    Raises:
        ModelError: there is none.
    """
    found = next((folder / name for name in TENSORS if check_file(folder / name)), None)
    if found is None:
        raise ModelError(f"{folder} holds {CONFIG}, but not the tensors ({TENSORS[0]}); copy the whole adapter")
    return found


def fingerprint_adapter(folder: Path) -> str:
    """What the adapter in `folder` is, as "sha256:…" over its two files.

    Raises:
        ModelError: a file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in (folder / CONFIG, find_tensors(folder)):
            with file.open("rb") as stream:
                digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    except OSError as error:
        raise ModelError(f"cannot read {error.filename}: {error.strerror}. Look at who may read the adapter") from error
    return f"sha256:{digest.hexdigest()}"
