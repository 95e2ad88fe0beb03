"""Names to folders: what `--model` says, as a folder on this machine."""

from __future__ import annotations

from pathlib import Path

from batchgen.models import hub
from batchgen.models.definition.errors import ModelError
from batchgen.models.definition.files import check_file
from batchgen.models.definition.folders import check_model_folder, snapshot_in


def find_folder(name: str) -> Path:
    """The folder of the model called `name`: a folder, or `ORG/NAME[@REVISION]` in the hub's cache.

    Raises:
        ModelError: it is not here, or no model folder; the message says what it is.
        OSError, ValueError, RuntimeError: as `folder.explained` has them.
    """
    path = Path(name).expanduser()
    if not path.is_dir() and check_file(path):
        raise ModelError(_describe_file(path))
    folder = snapshot_in(path.resolve()) if path.is_dir() else hub.find(name)
    check_model_folder(folder)
    return folder


def _describe_file(path: Path) -> str:
    """What to give in the place of a file."""
    if path.suffix == ".gguf":
        return f"{path} is a GGUF file, which batchgen does not read; take the model in the layout of Transformers"
    return f"{path} is a file; --model takes the folder that holds it, with config.json, tokenizer and weights"
