"""The files of a model's weights, as far as their beginnings tell: whether they are whole, and what they hold."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

from batchgen.models.definition.errors import ModelError, one_line
from batchgen.models.definition.files import check_file, describe_stand_in

_FLOATING = ("F64", "F32", "F16", "BF16")
_AGAIN = "copy or download the model again"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # how files of torch.save begin: since torch 1.6, and before


def check_weight_file(path: Path, *, packed: bool) -> None:
    """Whether `path` is a whole file of weights: of safetensors by its header, of torch.save by both ends.

    Args:
        packed: the config says how to read weights of other than floating types (`quantization_config`).

    Raises:
        ModelError: it is not, or its weights are of a type that nothing says how to read.
    """
    if not check_file(path):
        raise ModelError(f"{path} is missing; {_AGAIN}")
    with path.open("rb") as file:
        begin = file.read(1000)
    stand_in = describe_stand_in(begin)
    if stand_in is not None:
        raise ModelError(f"{path} {stand_in}")
    if path.suffix == ".safetensors":
        _check_tensors(path, packed)
    elif begin.startswith(_ZIP) and not zipfile.is_zipfile(path):
        raise ModelError(f"{path} has no end: it was cut off; {_AGAIN}")
    elif not begin.startswith((_ZIP, _PICKLE)):
        raise ModelError(f"{path} is no file that torch.save has written; {_AGAIN}")


def _check_tensors(path: Path, packed: bool) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys() if not packed else ():
                dtype = file.get_slice(name).get_dtype()
                # Buffers, masks for one, may be of any type: a matrix of weights may not.
                if name.endswith(".weight") and dtype not in _FLOATING:
                    raise ModelError(
                        f"{path} holds {name} as {dtype}, and config.json has no quantization_config that says how to "
                        "read it; take the config.json that belongs to these weights"
                    )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path} is no whole file of safetensors ({one_line(error)}); {_AGAIN}") from error


def tensor_shapes(files: Iterable[Path]) -> dict[str, list[int]]:
    """The shape of each tensor in those of `files` that are safetensors, by name."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes
