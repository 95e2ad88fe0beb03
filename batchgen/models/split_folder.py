"""A model folder whose weights are split by rank already: what its `split.json` says. Standard library only.

In the folder:

    split.json                             of which model, over how many ranks, which files
    rank-00000-00001.safetensors …         of each rank; as many as it takes
    config.json, tokenizer.json …          as the model has them
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from batchgen.types import UserError

NAME = "split.json"


class SplitError(UserError):
    """A split model cannot be used: a sentence for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Split:
    """What `split.json` says."""

    ranks: int  # of a tensor-parallel group
    dtype: str  # float32, bfloat16, float16, or int8: 8 bits with scales
    computes_in: str  # the type of what is not in 8 bits
    model: str  # the name of the model it was made from, and its revision: what a run is compared by
    revision: str
    files: Sequence[Sequence[str]]  # of each rank, in the order in which they were written
    deepspeed: str  # the version whose AutoTP has split it


def read(folder: Path) -> Split | None:
    """What `split.json` in `folder` says; None if the folder is an ordinary model.

    Raises:
        SplitError: it cannot be read, or a file of weights is missing.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        split = Split(**found)
        names = [name for files in split.files for name in files]
        whole = len(split.files) == split.ranks
    except (OSError, ValueError, TypeError) as error:
        raise SplitError(f"{path} cannot be read ({error}); split the model again") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not whole:
        name = missing[0] if missing else f"those of rank {len(split.files)}"
        raise SplitError(f"{folder} is not whole: {name} is missing; copy it again, or split the model again")
    return split


def to_json(split: Split) -> bytes:
    """The content of `split.json`."""
    content: Mapping[str, object] = asdict(split)
    return json.dumps(content, indent=2).encode() + b"\n"
