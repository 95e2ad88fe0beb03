"""Where a module keeps a weight of 8 or 4 bits: beside a parameter of the same name, shape and type, without memory."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from batchgen.models.quantised.weight import QuantisedWeight

_Module = TypeVar("_Module", bound=nn.Module)

_PLACE = "quantised"
_PLACE_OF_EXPERTS = "quantised_experts"


def is_transposed(module: nn.Module, name: str = "weight") -> bool:
    """Returns whether the parameter `name` of `module` is […, in, out], and not […, out, in] as a linear layer's is.

    `Conv1D` (GPT-2) and the experts of some families are so.
    """
    if name == "weight":
        return isinstance(module, Conv1D)
    return bool(getattr(module, "is_transposed", False))


def get_quantised(module: nn.Module, name: str = "weight") -> QuantisedWeight | None:
    """Returns the quantised form of the parameter `name` of `module`; None: it is a plain parameter.

    A layer has [out, in]; experts have [experts, out, in], whichever way round the family's own module has them.
    """
    if name == "weight":
        found: QuantisedWeight | None = module.__dict__.get(_PLACE)
        return found
    places: dict[str, QuantisedWeight] = module.__dict__.get(_PLACE_OF_EXPERTS, {})
    return places.get(name)


def set_quantised(module: nn.Module, name: str, weight: QuantisedWeight, dtype: torch.dtype | None = None) -> None:
    """Puts `weight` beside the parameter `name` of `module`, which becomes one of zeros without memory.

    The parameter keeps its shape and moves to the device of `weight`.

    Args:
        dtype: of the parameter from now on, which is what the layer computes in; None: as it was.
    """
    place = module._parameters[name]
    assert place is not None
    # Not through `setattr`: what is set is neither a parameter, nor a buffer, nor a module.
    if name == "weight":
        module.__dict__[_PLACE] = weight
    else:
        module.__dict__.setdefault(_PLACE_OF_EXPERTS, {})[name] = weight
    zeros = make_zeros(place.shape, dtype or place.dtype, weight.values.device)
    module._parameters[name] = nn.Parameter(zeros, requires_grad=False)


def move_quantised(source: nn.Module, target: _Module) -> _Module:
    """Gives `target`, whose parameters are those of `source`, their quantised forms as well; returns it."""
    for place in (_PLACE, _PLACE_OF_EXPERTS):
        if place in source.__dict__:
            target.__dict__[place] = source.__dict__.pop(place)
    return target


def make_zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns zeros that are one number in memory."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def widen_all(model: nn.Module) -> None:
    """Turns each quantised weight of `model` into a plain parameter, one after the other.

    Engines that have no products of quantised weights call this; then the model is as large as one of 16 bits.
    """
    for module in model.modules():
        named = {"weight": module.__dict__.pop(_PLACE)} if _PLACE in module.__dict__ else {}
        named |= module.__dict__.pop(_PLACE_OF_EXPERTS, {})
        for name in list(named):
            place, weight = module._parameters[name], named.pop(name)
            assert place is not None
            wide = weight.widen(place.dtype)
            if is_transposed(module, name):
                wide = wide.transpose(-1, -2).contiguous()
            module._parameters[name] = nn.Parameter(wide, requires_grad=False)
