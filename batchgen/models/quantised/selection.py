"""Which weights of a model are rounded: the matrices of its decoder's layers, and of the experts in them.

Embeddings, the output matrix, norms and what chooses the experts keep their type. So do encoders of pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from batchgen.models.quantised.places import is_transposed

_ROUTER = re.compile(r"(^|\.)(\w+_)?(gate|router)(\.|$)")
"""Modules that choose experts, or say how much of a shared one is added."""

_OTHER_LINEAR = ("Conv1D", "FalconLinear", "LinearLayer", "LinearAllreduce", "fused_LinearLayer")
"""Classes of layers that compute what `torch.nn.Linear` does: GPT-2's, Falcon's, and a rank's share of one, made by
DeepSpeed. Others that derive from `torch.nn.Linear` may compute something else."""

_OF_EXPERTS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class RoundedPlace:
    """A parameter that is rounded."""

    module: nn.Module
    name: str  # in the module
    is_transposed: bool  # it holds […, in, out]

    @property
    def numel(self) -> int:
        """Numbers of the parameter."""
        return self.module._parameters[self.name].numel()  # type: ignore[union-attr]

    @property
    def columns(self) -> int:
        """Inputs of the product."""
        return int(self.module._parameters[self.name].shape[-2 if self.is_transposed else -1])  # type: ignore[union-attr]


def choose_weights(model: Any) -> dict[str, RoundedPlace]:
    """Returns the parameters of `model` that are rounded, by their paths; `model` may be a rank's share of one."""
    decoder = model.get_decoder()
    names = {id(module): path for path, module in model.named_modules()}
    before = names.get(id(decoder), "")
    chosen = {}
    for path, module in model.named_modules():
        inside = path.removeprefix(before).lstrip(".") if path.startswith(before) else ""
        if any(part.isdigit() for part in inside.split(".")) and not _ROUTER.search(inside):
            for name in _list_matrices(module):
                chosen[f"{path}.{name}"] = RoundedPlace(module, name, is_transposed(module, name))
    return chosen


def _list_matrices(module: Any) -> Iterator[str]:
    """Yields the names of a module's parameters that are matrices of products."""
    if is_linear(module):
        yield "weight"
    elif hasattr(module, "_apply_gate") and hasattr(module, "has_gate"):  # experts of Transformers, all in one tensor
        yield from (name for name in _OF_EXPERTS if module._parameters.get(name) is not None)


def is_linear(module: nn.Module) -> bool:
    """Returns whether a module computes a product with its weight, adds its bias, and nothing else."""
    return type(module) is nn.Linear or type(module).__name__ in _OTHER_LINEAR
