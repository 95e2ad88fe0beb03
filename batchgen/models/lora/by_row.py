"""Adapters that rows name: what each adds to which layer of a model, beside weights that stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchgen.models.definition.build import build_empty
from batchgen.models.definition.errors import ModelError
from batchgen.models.lora.adapter import read_adapter
from batchgen.models.lora.change import Change
from batchgen.models.lora.check import check_adapter, place_by_config

_LINEAR_LAYERS = (
    "torch.nn.modules.linear.Linear",
    "transformers.pytorch_utils.Conv1D",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
)
"""The classes of layers that compute a product and nothing else. Of a class that is derived from one, nothing is known.
Their names, since the module of a family takes a while to import."""


@dataclass(frozen=True)
class RowAdapters:
    """The products that several adapters add to the layers of a model."""

    changes: Mapping[str, Sequence[Change | None]]
    """By the name of the layer, in the order of the adapters; None: that adapter does not change this layer."""

    @property
    def rank(self) -> int:
        """The largest of all ranks."""
        changes = (change for of_layer in self.changes.values() for change in of_layer)
        return max(len(change.down) for change in changes if change is not None and change.down is not None)


def check_row_adapters(folders: Mapping[str, str], model: Path, tokenizer: Any) -> None:
    """Checks that rows can name these adapters of the model in folder `model`, before any weight of it is read.

    Args:
        folders: of the adapters, by their names.
        tokenizer: the model's `HfTokenizer`.

    Raises:
        ModelError: they cannot; the message names the adapter, and says why and what to do.
    """
    for folder in folders.values():
        check_adapter(folder, model, tokenizer, is_merged=False)
    read_row_adapters(folders, tokenizer.config)


def read_row_adapters(folders: Mapping[str, str], config: Any) -> RowAdapters:
    """Reads adapters of a model of this Transformers config.

    Args:
        folders: of the adapters, by their names.

    Raises:
        ModelError: one does not fit, or is more than products that are added to linear layers.
    """
    empty = build_empty(config)
    ends = {id(empty.get_input_embeddings()): "the embedding", id(empty.get_output_embeddings()): "the output matrix"}
    found: dict[str, list[Change | None]] = {}
    for number, (name, folder) in enumerate(folders.items()):
        places = place_by_config(read_adapter(folder), config)
        for (parameter, _), changes in places.parts.items():
            raise _refuse(name, folder, next(iter(changes.values())), f"a part of {parameter}")
        for parameter, change in places.whole.items():
            layer = parameter.rpartition(".")[0]
            owner = empty.get_submodule(layer)
            what = ends.get(id(owner), "") or _find_other_kind(change, parameter)
            kind = type(owner)
            if not what and f"{kind.__module__}.{kind.__qualname__}" not in _LINEAR_LAYERS:
                what = f"a layer of class {kind.__name__}"
            if what:
                raise _refuse(name, folder, change, what)
            found.setdefault(layer, [None] * len(folders))[number] = change
    return RowAdapters(found)


def _find_other_kind(change: Change, parameter: str) -> str:
    """What `change` is besides a product that is added to a matrix; "" for nothing."""
    if change.experts:
        return "the weights of experts (target_parameters)"
    if change.magnitude is not None:
        return "a weight with a magnitude of its own (DoRA)"
    if change.bias is not None or parameter.endswith(".bias"):
        return "a bias"
    return "" if change.is_low_rank else "a whole weight (modules_to_save)"


def _refuse(name: str, folder: str, change: Change, what: str) -> ModelError:
    return ModelError(
        f"the adapter {name!r} ({folder}) changes {what}, by its tensor {change.tensor}, which a row cannot have for "
        "itself; give its rows a run of their own, in which --adapter FOLDER merges it"
    )
