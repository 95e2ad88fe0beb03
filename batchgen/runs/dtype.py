"""The type of number that a run computes in: settled when it begins, and kept by every later start, on any machine."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchgen.checkpoint import RunFolder
from batchgen.models import split_folder

logger = logging.getLogger(__name__)

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Dtype:
    """A type, as `--dtype` takes it."""

    name: str  # what is computed in; auto: no model is there that it could be settled for
    recorded: str  # what run.json calls it


def find(given: str, folder: RunFolder, model: Path) -> Dtype:
    """The type that was given; else that of the run that has begun in `folder`; else that of a split model's files.

    Raises:
        CheckpointError: run.json is damaged.
        SplitError: split.json is.
    """
    if given != AUTO:
        return Dtype(given, given)
    if folder.has_manifest():
        recorded = str(folder.read_identity().get("dtype", AUTO))
        return Dtype(recorded, recorded)
    split = split_folder.read(model)
    name = split.dtype if split is not None and split.dtype != "int8" else AUTO
    return Dtype(name, "")


def settle(given: Dtype, tokenizer: Any, *, say: bool) -> Dtype:
    """The type that is computed in, where `find` has found auto: this machine's choice for the model of `tokenizer`.

    A run of version 0.1 has recorded auto itself. It computed in the type of the model's config, and goes on in it.

    Args:
        say: log it where it is not the type of the model's config.
    """
    config = getattr(tokenizer, "config", None)
    if given.name != AUTO or config is None:
        return Dtype(given.name, given.recorded or given.name)
    from batchgen.models import loading  # imports torch, and an engine without a model needs none

    own = loading.own_dtype(config)
    dtype = own if given.recorded else loading.automatic_dtype(config)
    if say and dtype != own:
        logger.info(
            "dtype %s: this machine's processor is slow in the model's own %s, and there is no GPU",
            loading.name_of(dtype),
            loading.name_of(own),
        )
    name = loading.name_of(dtype)
    name = name if name in loading.FLOATING else AUTO  # of other types only the engine knows what to do with them
    return Dtype(name, given.recorded or name)
