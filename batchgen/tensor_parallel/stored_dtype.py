"""The type of the weights in a model's files, by their headers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch

from batchgen.engine import EngineError
from batchgen.models import loading
from batchgen.models.folder import weight_files

# As the safetensors format names them.
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def find_stored_dtype(folder: Path) -> torch.dtype:
    """Returns the floating type that most bytes of the weights in `folder` have.

    Raises:
        EngineError: the files cannot be read, or hold none.
    """
    sizes: Counter[torch.dtype] = Counter()
    for dtype, size in _list_stored(folder):
        sizes[dtype] += size
    if not sizes:
        raise EngineError(f"the weights in {folder} are of no floating type; this engine does not read packed ones")
    return sizes.most_common(1)[0][0]


def _list_stored(folder: Path) -> Iterator[tuple[torch.dtype, int]]:
    """Yields type and bytes of each floating tensor in the files of `folder`; only their headers are read."""
    files = weight_files(folder)  # all of one kind
    tables = [path for path in files if path.suffix == ".safetensors"]
    for path in tables:
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (OSError, ValueError, MemoryError, OverflowError) as error:
            raise EngineError(f"{path} cannot be read as safetensors ({error}); copy or download it again") from error
        for name, tensor in header.items():
            if name != "__metadata__" and tensor["dtype"] in _TYPES:
                begin, end = tensor["data_offsets"]
                yield _TYPES[tensor["dtype"]], end - begin
    for path in () if tables else files:
        try:
            tensors = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except UnpicklingError as error:
            raise loading.refused_pickle(folder) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise EngineError(f"{path} cannot be read ({error}); copy or download it again") from error
        for tensor in tensors.values():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                yield tensor.dtype, tensor.nbytes
