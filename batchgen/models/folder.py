"""What a model folder holds: its weight files, and what tells it from another model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from batchgen.models.definition.errors import ModelError
from batchgen.models.definition.files import DEFINITION, check_file, find_packing, read_json
from batchgen.models.definition.weights import check_weight_file

Report = Callable[[str], None]
"""Takes one sentence about what is going on, for the person who waits."""

# Where Transformers looks for weights, in its order; an index names the files they are spread over.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_MIB = 1 << 20


@contextmanager
def explained(name: str) -> Iterator[None]:
    """What the file system, or the hub's own check of names, says to the search for model `name`, as a ModelError."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"cannot read {error.filename or name}: {error.strerror or error}. Look at who may read the model, and "
            "whether the path is right"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{name!r} is neither a folder here nor the name of a hub model: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of the model in `folder`, in the order of their names.

    Raises:
        ModelError: there are none that Transformers reads, or some are missing.
    """
    first = next((name for name in WEIGHTS if check_file(folder / name)), None)
    if first is None:
        raise ModelError(f"{folder} holds no weights that Transformers reads ({WEIGHTS[0]} or the like)")
    if not first.endswith(".index.json"):
        return [folder / first]
    names = indexed(folder / first)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder} is not whole: {len(missing)} of its {len(names)} weight files are missing ({missing[0]})"
        )
    return [folder / name for name in names]


def indexed(index: Path) -> list[str]:
    """The names of the weight files that an index lists, sorted.

    Raises:
        ModelError: it is no such index.
    """
    weights = (read_json(index) or {}).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise ModelError(
            f"{index} cannot be read as an index of weight files: weight_map must be an object with the name of a file "
            "for each weight; copy it again from where the model came from"
        )
    return sorted(set(weights.values()))


def check_weight_files(folder: Path) -> None:
    """Whether the weight files of the model in `folder` are whole, as far as their beginnings tell.

    Raises:
        ModelError: there are none, some are missing, or one is something else.
    """
    config = read_json(folder / "config.json") or {}
    files = weight_files(folder)
    _check_metadata(folder)
    for file in files:
        check_weight_file(file, packed=bool(find_packing(config)))


def _check_metadata(folder: Path) -> None:
    """Transformers reads an index of weight files only with an object `metadata` in it."""
    first = next(name for name in WEIGHTS if (folder / name).exists())
    if first.endswith(".index.json") and not isinstance((read_json(folder / first) or {}).get("metadata"), dict):
        raise ModelError(
            f'{folder / first} has no object "metadata", without which Transformers does not read it; copy it again '
            'from where the model came from, or add "metadata": {}'
        )


def definition_files(folder: Path) -> list[Path]:
    """The files of `DEFINITION` that the model in `folder` has, and that are read."""
    names = [name for name in DEFINITION if (folder / name).is_file()]
    # Mistral's own tokenizer is read where there is no other.
    return [folder / name for name in names if not (name == "tekken.json" and "tokenizer.json" in names)]


def check_readable(files: Iterable[Path]) -> None:
    """Raises OSError if one of `files` cannot be opened: a loader would say so later, and in words of its own."""
    for file in files:
        file.open("rb").close()


def fingerprint(folder: Path) -> str:
    """What the model in `folder` is, as "sha256:…": its definition whole; of each weight file name, size and both ends.

    The first MiB of a weight file holds the safetensors header and the beginning of the weights: enough to tell models
    apart, and read within a second however large they are.

    Raises:
        ModelError: as `weight_files`.
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in definition_files(folder):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_MIB))
            stream.seek(max(0, size - _MIB))
            digest.update(stream.read(_MIB))
    return f"sha256:{digest.hexdigest()}"
