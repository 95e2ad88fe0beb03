"""The merge itself: a step in Transformers' own conversion of the weights in files to the parameters of a model.

Whatever the way of a weight is after that - to a device, to a disk, quantised, or sharded by ZeRO - it is the changed
weight that goes there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import modeling_utils
from transformers.core_model_loading import ConversionOps, WeightConverter

from batchgen.models.definition.errors import ModelError
from batchgen.models.lora.adapter import Adapter, describe, read_adapter
from batchgen.models.lora.change import Change
from batchgen.models.lora.places import Places, check_shape, find_places

Wanted = Callable[[Change], bool]
"""Whether a change of a whole parameter is to be made while the model is loaded."""


def all_changes(change: Change) -> bool:
    """Every change is wanted."""
    return True


@contextmanager
def merged_on_load(folder: str, wants: Wanted = all_changes) -> Iterator[None]:
    """Meanwhile, each model that Transformers loads is loaded with the adapter in `folder`; "" is none.

    Args:
        wants: of the changes of whole parameters, those that are made here; the caller makes the others.

    Raises:
        ModelError: the adapter cannot be read, or does not fit.
    """
    if not folder:
        yield
        return
    adapter = read_adapter(folder)
    merges: list[_Merge] = []
    transformers_loader: Any = modeling_utils
    original = transformers_loader.get_model_conversion_mapping

    def with_merge(model: Any, *arguments: Any, **named: Any) -> list[Any]:
        conversions = original(model, *arguments, **named)
        places = find_places(adapter, model, conversions)
        whole = {name: change for name, change in places.whole.items() if wants(change)}
        merges.append(_Merge(adapter, Places(whole, places.parts)))
        return merges[-1].join(conversions)

    # Warning: a function of Transformers is replaced while a model is loaded. If a new version asks for the conversions
    # by another name, nothing is merged, and `check_complete` says so.
    transformers_loader.get_model_conversion_mapping = with_merge
    try:
        yield
    except Exception as error:
        raised = next((merge.error for merge in merges if merge.error is not None), None)
        if raised is None:
            raise
        raise raised from error
    finally:
        transformers_loader.get_model_conversion_mapping = original
    if not merges:
        raise ModelError(f"{describe(adapter)} was not merged: this version of Transformers loads models another way")
    for merge in merges:
        merge.check_complete()


class _Merge:
    """The merge of an adapter into one model, as it is loaded."""

    def __init__(self, adapter: Adapter, places: Places) -> None:
        self.adapter, self.places = adapter, places
        self.open: set[Any] = {*places.whole, *((key, at) for key, part in places.parts.items() for at in part)}
        self.error: Exception | None = None  # the first one: Transformers goes on, and raises one of its own

    def join(self, conversions: list[Any]) -> list[Any]:
        """Returns `conversions` with the merge in them."""
        for conversion in conversions:
            if isinstance(conversion, WeightConverter):
                conversion.operations = [_ChangeParts(self), *conversion.operations, _ChangeMade(self)]
        ends = sorted({".".join(name.split(".")[-2:]) for name in self.places.whole}, key=len)
        # At the end of the list, since the first one that matches a name has it.
        return [
            *conversions,
            *(WeightConverter(rf"(?<![^.]){re.escape(end)}$", end, [_ChangeWhole(self)]) for end in ends),
        ]

    def change(self, key: Any, change: Change, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns the changed weight in `dtype`, and notes that the change `key` is made."""
        self.open.discard(key)
        return change.apply(weight).to(dtype)

    def check_complete(self) -> None:
        """Raises ModelError if a change was not made, since the weight came another way."""
        if self.open:
            name = min(map(str, self.open))
            raise ModelError(
                f"{describe(self.adapter)} cannot be merged as the model is loaded: {name} (one of {len(self.open)}) "
                "is not in the model's files by this name; merge it with peft into a copy of the model, and give that "
                "as --model"
            )


class _Operation(ConversionOps):
    """A step of a converter that changes weights by what an adapter says of them."""

    def __init__(self, merge: _Merge) -> None:
        self._merge = merge

    def __deepcopy__(self, memo: Any) -> _Operation:
        return self  # a converter is copied for each parameter, and the adapter's tensors need not be

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **named: Any,
    ) -> dict[str, Any]:
        """Returns the weights of the parameter `full_layer_name`, lists by pattern, with the changes."""
        try:
            return self._change(input_dict, target_patterns, full_layer_name, model)
        except Exception as error:
            self._merge.error = self._merge.error or error
            raise

    def _change(self, weights: dict[str, Any], targets: list[str], name: str, model: Any) -> dict[str, Any]:
        raise NotImplementedError


class _ChangeWhole(_Operation):
    """The only step of a parameter that one weight of the files is."""

    def _change(self, weights: dict[str, Any], targets: list[str], name: str, model: Any) -> dict[str, Any]:
        (weight,) = next(iter(weights.values()))
        change = self._merge.places.whole.get(name)  # another parameter may have a name that ends like this
        if change is not None:
            check_shape(self._merge.adapter, model, name, change, weight)
            weight = self._merge.change(name, change, weight, _find_dtype(model, name, weight))
        return {targets[0]: weight}


class _ChangeMade(_Operation):
    """The last step of parameters that are made of several weights of the files, or of which several are in one."""

    returns_what_it_leaves = True  # the same object, where nothing is changed

    def _change(self, weights: dict[str, Any], targets: list[str], name: str, model: Any) -> dict[str, Any]:
        for target, made in weights.items():
            own = name.replace(targets[0], target)
            if (change := self._merge.places.whole.get(own)) is not None:
                weight = made[0] if isinstance(made, list) else made
                check_shape(self._merge.adapter, model, own, change, weight)
                weights[target] = self._merge.change(own, change, weight, _find_dtype(model, own, weight))
        return weights


class _ChangeParts(_Operation):
    """The first step of a parameter that is made of several weights of the files."""

    keeps_parts_apart = True  # for a loader that stacks nothing (`batchgen.tensor_parallel`)

    def _change(self, weights: dict[str, Any], targets: list[str], name: str, model: Any) -> dict[str, Any]:
        merge = self._merge
        for pattern, parts in weights.items():
            for at, change in merge.places.parts.get((name, pattern), {}).items():
                if at >= len(parts):
                    raise ModelError(
                        f"{describe(merge.adapter)} does not fit the model: {change.tensor} is for expert {at}, and "
                        f"the model has {len(parts)} (0 to {len(parts) - 1})"
                    )
                check_shape(merge.adapter, model, change.tensor, change, parts[at])
                dtype = _find_dtype(model, name, parts[at])
                parts[at] = merge.change(((name, pattern), at), change, parts[at], dtype)
        return weights


def _find_dtype(model: Any, name: str, weight: torch.Tensor) -> torch.dtype:
    """The type of the parameter; where it will be quantised, that of the weight before."""
    dtype: torch.dtype = model.get_parameter(name).dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else weight.dtype
