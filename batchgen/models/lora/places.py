"""Where the changes of an adapter belong in a model: by the names that Transformers has for its weights today."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from batchgen.models.definition.errors import ModelError
from batchgen.models.lora.adapter import Adapter, describe
from batchgen.models.lora.change import Change

_OF_TOKENS = (
    "it brings tokens of its own. Merge it with peft into a copy of the model (resize_token_embeddings, "
    "merge_and_unload), save the adapter's tokenizer there, and give that as --model"
)


@dataclass(frozen=True, slots=True)
class Places:
    """The changes of an adapter by what they change in a model."""

    whole: Mapping[str, Change]  # by the name of the parameter
    parts: Mapping[tuple[str, str], Mapping[int, Change]]
    """Of parameters that are made of several weights of the files, as experts are: by the parameter and the pattern of
    the converter that makes it, and then by the position of the weight among those of that pattern."""


def find_places(adapter: Adapter, model: Any, conversions: Sequence[Any]) -> Places:
    """Returns where the changes of `adapter` belong in `model`, which may be on the device "meta" or be sharded.

    Args:
        conversions: how Transformers makes the parameters of this model from the weights in its files.

    Raises:
        ModelError: one does not fit; the message names the tensor of the adapter and the weight of the model.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    whole: dict[str, Change] = {}
    parts: dict[tuple[str, str], dict[int, Change]] = {}
    for name, change in adapter.changes.items():
        place, pattern = name, None
        if name not in parameters:
            place, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if place not in parameters and (of_experts := _find_of_experts(adapter, model, name, change)):
            whole[of_experts[0]] = of_experts[1]
            continue
        if place not in parameters:
            raise ModelError(
                f"{describe(adapter)} does not fit the model{_name(model)}: its tensor {change.tensor} is for {name}, "
                f"which a {model.config.model_type} model has not. Give the model that the adapter was trained on"
            )
        if pattern is not None:
            numbers = re.findall(r"\.(\d+)\.", name)
            parts.setdefault((place, pattern), {})[int(numbers[-1])] = adapter.scale(change, _layer_of(name))
            continue
        turned = change.is_turned or isinstance(model.get_submodule(_layer_of(place)), Conv1D)
        named = name if _is_parameter_of(adapter, name) else _layer_of(name)
        whole[place] = adapter.scale(replace(change, is_turned=turned), named)
        # A weight that is sharded and quantised has a shape of its own, and is looked at when it comes.
        if not hasattr(parameters[place], "ds_shape"):
            check_shape(adapter, model, place, whole[place], parameters[place])
    _check_tied(adapter, model, whole)
    return Places(whole, parts)


def _find_of_experts(adapter: Adapter, model: Any, name: str, change: Change) -> tuple[str, Change] | None:
    """The parameter of all experts of a layer that `change` fits, and the change of it; None: there is none.

    peft names the layer alone. Of several parameters, it names those behind the first with `.base_layer`.
    """
    layer = _layer_of(name)
    while layer.endswith(".base_layer"):
        layer = layer.removesuffix(".base_layer")
    owner = dict(model.named_modules()).get(layer)
    for own, parameter in owner.named_parameters(recurse=False) if owner is not None else ():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        made = replace(change, is_turned=bool(getattr(owner, "is_transposed", False)), experts=shape[0])
        if len(shape) == 3 and change.up is not None and made.shape == shape:
            return f"{layer}.{own}", adapter.scale(made, f"{layer}.{own}", experts=shape[0])
    return None


def _is_parameter_of(adapter: Adapter, name: str) -> bool:
    """Whether the config names this weight itself (target_parameters), and not its layer."""
    listed = adapter.config.get("target_parameters") or ()
    return any(name == entry or name.endswith(f".{entry}") for entry in listed)


def _layer_of(name: str) -> str:
    return name.rpartition(".")[0]


def check_shape(adapter: Adapter, model: Any, name: str, change: Change, weight: torch.Tensor) -> None:
    """Raises ModelError if `weight`, which is called `name` in the model, is not of the shape that is changed."""
    shape = tuple(weight.shape)
    if change.shape == shape and all(tensor is None or tensor.shape == shape for tensor in (change.value, change.bias)):
        return
    of_words = (model.get_input_embeddings(), model.get_output_embeddings())
    owner = dict(model.named_modules()).get(_layer_of(name))
    value = change.value
    is_matrix = value is not None and value.dim() == len(shape)
    if owner is not None and owner in of_words and value is not None and is_matrix and len(value) != shape[0]:
        why = f"{change.tensor} has {len(value)} tokens and the model {shape[0]}: {_OF_TOKENS}"
    else:
        given = list(change.shape if value is None else value.shape)
        why = f"{change.tensor} is for a weight of {given}, and {name} is {list(shape)}. Give the model that the "
        why += "adapter was trained on"
    raise ModelError(f"{describe(adapter)} does not fit the model{_name(model)}: {why}")


def _check_tied(adapter: Adapter, model: Any, whole: dict[str, Change]) -> None:
    """Refuses a change that would make two weights of one; of two equal new values, keeps one.

    Raises:
        ModelError: the model's embedding is its output matrix as well, and the adapter changes one of them alone.
    """
    names = {id(module): name for name, module in model.named_modules()}
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    if len(ends) < 2 or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    first, second = (f"{names[id(module)]}.weight" for module in ends)
    changes = [whole[name] for name in (first, second) if name in whole]
    if not changes:
        return
    values = [change.value for change in changes if change.value is not None and change.up is None]
    if len(values) == 2 and torch.equal(*values):
        del whole[second]
        return
    raise ModelError(
        f"{describe(adapter)} changes {first if first in whole else second}, which is one weight with "
        f"{second if first in whole else first} in the model{_name(model)} (tie_word_embeddings); merge it with peft "
        "into a copy of the model, with tie_word_embeddings false in its config.json, and give that as --model"
    )


def _name(model: Any) -> str:
    return f" in {model.config.name_or_path}" if model.config.name_or_path else ""
