"""The folder of a model that is written here: whole or not at all, its weights a file's worth at a time."""

from __future__ import annotations

import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from batchgen.engine import EngineError
from batchgen.models.definition.errors import one_line
from batchgen.models.definition.files import DEFINITION

_FILE_BYTES = 2 << 30  # of a file, so that writing one needs no more memory than this


@contextmanager
def making_folder(out: Path) -> Iterator[Path]:
    """Gives an empty folder, which gets the absolute path `out` when the block ends without an exception.

    Under that name there is never half of it.

    Raises:
        EngineError: it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as name:
            half = Path(name, "half")
            half.mkdir()
            yield half
            half.rename(out)
    except OSError as error:
        raise EngineError(f"cannot write {out}: {error.strerror or error}") from error
    except SafetensorError as error:  # its writer has no other: no space left, say
        raise EngineError(f"cannot write {out}: {one_line(error)}") from error


def copy_definition(source: Path, folder: Path, *, without: str = "") -> None:
    """Copies what defines the model in `source`, beside its weights: config, tokenizer, templates; not `without`."""
    for file in filter(Path.is_file, map(source.joinpath, DEFINITION)):
        if file.name != without:
            shutil.copy(file, folder)


def divide(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the tensors, by their names, a file's worth at a time."""
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if part and size + tensor.nbytes > _FILE_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor.detach().contiguous()
        size += tensor.nbytes
    yield part


def save(tensors: dict[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes one file of safetensors, for those whom the umask lets read it."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)  # safetensors makes a file that others cannot read, whatever the umask
