"""The tensors of a checkpoint as its files have them, and the layers that several of them make."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from batchgen.models.definition.errors import ModelError, one_line
from batchgen.models.quantised.weight import QuantisedWeight

Convert = Callable[[Mapping[str, torch.Tensor]], QuantisedWeight]
"""Makes a weight of the tensors of a layer, by the ends of their names."""


class _File:
    """A file of safetensors, mapped when something of it is read for the first time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    @cached_property
    def _handle(self) -> Any:
        return safe_open(self.path, framework="pt")

    def view(self, name: str) -> torch.Tensor:
        with self._lock:  # the first of several threads opens it
            handle = self._handle
        tensor: torch.Tensor = handle.get_tensor(name)
        return tensor


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, of which nothing has been read but its name, type and shape."""

    name: str
    dtype: str
    """As safetensors names it: F32, F8_E4M3, I32."""
    shape: tuple[int, ...]
    file: _File

    def view(self) -> torch.Tensor:
        """Returns the tensor as part of the mapped file: its numbers are read when they are used."""
        return self.file.view(self.name)

    def check_shape(self, *shapes: Sequence[int]) -> None:
        """Raises ModelError if the tensor has none of these shapes."""
        if self.shape not in [tuple(shape) for shape in shapes]:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ModelError(
                f"{self.file.path}: {self.name} has the shape {list(self.shape)}, where the other tensors of its layer "
                f"and the quantization_config in config.json make it {wanted}; copy or download the model again"
            )

    def take_matrix_shape(self) -> tuple[int, int]:
        """Returns rows and columns.

        Raises:
            ModelError: it is no matrix.
        """
        if len(self.shape) != 2:
            raise ModelError(
                f"{self.file.path}: {self.name} has the shape {list(self.shape)}, and quantised weights of this format "
                "are read as matrices alone; take the model in another precision"
            )
        return self.shape[0], self.shape[1]

    def check_dtype(self, *dtypes: str) -> None:
        """Raises ModelError if the tensor has none of these types."""
        if self.dtype not in dtypes:
            raise ModelError(
                f"{self.file.path}: {self.name} is {self.dtype}, where the quantization_config in config.json makes it "
                f"{' or '.join(dtypes)}; take the config.json that belongs to these weights"
            )


@dataclass(frozen=True)
class StoredWeight:
    """A quantised weight in files."""

    name: str
    """Of the parameter that it would be if it were not quantised: "….weight"."""
    shape: tuple[int, ...]
    """[out, in], or [experts, out, in]."""
    parts: Mapping[str, StoredTensor]
    """What it is made of, by the ends of their names; of experts, each begins with their dimension."""
    convert: Convert
    is_transposed: bool = False
    """The parameter is [experts, in, out]."""

    def list_views(self, expert: int | None = None) -> dict[str, torch.Tensor]:
        """Returns the parts as views of their files.

        Args:
            expert: of one expert alone; None: of all, or of a weight that is no experts'.
        """
        whole = {end: part.view() for end, part in self.parts.items()}
        return whole if expert is None else {end: view[expert] for end, view in whole.items()}

    def read(self, device: torch.device | str, expert: int | None = None) -> QuantisedWeight:
        """Reads it to `device`, where it is converted: a GPU does that faster than a disk delivers."""
        views = self.list_views(expert)
        return self.convert({end: view.to(device, copy=True) for end, view in views.items()})


def list_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Returns the tensors in `files` by name; only headers are read.

    Raises:
        ModelError: a file is none of safetensors.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        if path.suffix != ".safetensors":
            raise ModelError(
                f"{path}: quantised weights are read from safetensors alone; take a version of the model that has them"
            )
        file = _File(path)
        try:
            with safe_open(path, framework="np") as header:
                for name in header.keys():  # noqa: SIM118  # no dict
                    piece = header.get_slice(name)
                    tensors[name] = StoredTensor(name, piece.get_dtype(), tuple(piece.get_shape()), file)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(
                f"{path} is no whole file of safetensors ({one_line(error)}); copy or download the model again"
            ) from error
    return tensors


def group_by_layer(
    tensors: Mapping[str, StoredTensor], ends: Iterable[str], dot: str = "."
) -> dict[str, dict[str, StoredTensor]]:
    """Returns, by the name of a layer, those of its tensors whose names end in one of `ends` after a `dot`."""
    layers: dict[str, dict[str, StoredTensor]] = {}
    wanted = set(ends)
    for name, tensor in tensors.items():
        layer, found, end = name.rpartition(dot)
        if found and end in wanted:
            layers.setdefault(layer, {})[end] = tensor
    return layers


def take_part(layer: str, parts: Mapping[str, StoredTensor], end: str, dot: str = ".") -> StoredTensor:
    """Returns the tensor of `layer` whose name ends so, after a `dot`.

    Raises:
        ModelError: it is missing.
    """
    if end not in parts:
        there = next(iter(parts.values()))
        raise ModelError(
            f"{there.file.path} holds {there.name}, but no file of the model holds {layer}{dot}{end}, which belongs to "
            "it; copy or download the model again"
        )
    return parts[end]


def take_words(layer: str, parts: Mapping[str, StoredTensor]) -> tuple[StoredTensor, StoredTensor, StoredTensor]:
    """Returns `qweight`, `qzeros` and `scales` of a layer: numbers of 4 bits in words, and floats.

    Raises:
        ModelError: one is missing, or of another type.
    """
    weight, zeros, scales = (take_part(layer, parts, end) for end in ("qweight", "qzeros", "scales"))
    weight.check_dtype("I32")
    zeros.check_dtype("I32")
    scales.check_dtype("F16", "BF16", "F32")
    return weight, zeros, scales
