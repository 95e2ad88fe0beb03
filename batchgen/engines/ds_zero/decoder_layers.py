"""The parts of a model that are gathered one by one: its decoder layers, its embedding and its output matrix."""

from __future__ import annotations

from typing import Any

from batchgen.models import architectures


def are_layers_listed(config: Any) -> bool:
    """Returns whether Transformers lists the classes of the decoder layers of models with this config."""
    return bool(getattr(architectures.model_class(config), "_no_split_modules", None))


def find_layers(model: Any) -> list[Any]:
    """Returns the decoder layers: the outermost modules of the classes that Transformers lists as not to be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers: list[Any] = []

    def search(module: Any) -> None:
        if type(module).__name__ in names:
            layers.append(module)
        else:
            for child in module.children():
                search(child)

    search(model)
    return layers


def find_ends(model: Any) -> list[Any]:
    """Returns embedding and output matrix, where they are two."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(weight) for end in ends if (weight := getattr(end, "weight", None)) is not None}
    return ends if len(weights) == 2 else []
