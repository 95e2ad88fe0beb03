"""The module that holds a quantised weight in a patched model."""

from __future__ import annotations

import torch
from torch import nn

from batchgen.engines.paged.adapters import LayerAdapters
from batchgen.engines.paged.experts.grouped_gemm import Sorting
from batchgen.engines.paged.experts.interface import HELD, asks_the_interface, name_up
from batchgen.engines.paged.quantised import products
from batchgen.engines.paged.quantised.packed import Packed
from batchgen.engines.paged.quantised.packing import can_hold, pack
from batchgen.engines.paged.quantised.rounding import round_inputs
from batchgen.models.quantised.places import get_quantised, move_quantised
from batchgen.models.quantised.weight import QuantisedWeight


class HeldWeight(nn.Module):
    """A quantised weight of a linear layer, or of a layer's experts, and its products.

    Its tensors are buffers, so that the compiler takes layers of the same sizes for the same code.

    Args:
        dtype: the type that the model computes in.
        bias: the one that every product will be given, if it is known.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
    order: torch.Tensor | None
    inputs_scale: torch.Tensor | None

    def __init__(self, weight: QuantisedWeight, dtype: torch.dtype, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        packed = pack(weight, dtype, bias)
        self._form = packed.form
        self.register_buffer("values", packed.values, persistent=False)
        self.register_buffer("scales", packed.scales, persistent=False)
        self.register_buffer("zeros", packed.zeros, persistent=False)
        self.register_buffer("bias", packed.bias, persistent=False)
        self.register_buffer("order", weight.order, persistent=False)
        fixed = None
        if weight.inputs_scale is not None:  # a number would be a constant to the compiler
            fixed = torch.tensor(weight.inputs_scale, dtype=torch.float32, device=weight.values.device)
        self.register_buffer("inputs_scale", fixed, persistent=False)
        self._rounding = weight.inputs, weight.inputs_group

    @property
    def packed(self) -> Packed:
        """The tensors that the operators take."""
        return Packed(self._form, self.values, self.scales, self.zeros)

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs are rounded to 8 bits; the self-test asks."""
        return bool(self._rounding[0])

    def multiply(
        self, inputs: torch.Tensor, bias: torch.Tensor | None, adapters: LayerAdapters | None = None
    ) -> torch.Tensor:
        """As `torch.nn.functional.linear`, with what each token's adapter adds."""
        stored, bias = self._store(inputs), bias if self.bias is None else self.bias
        if adapters is None:
            return products.multiply(*stored, self.packed, bias, inputs.dtype)
        return products.multiply_adapted(inputs, stored, self.packed, bias, adapters)

    def multiply_grouped(self, inputs: torch.Tensor, bias: torch.Tensor | None, sorting: Sorting) -> torch.Tensor:
        """As `experts.grouped_gemm.multiply`."""
        bias = bias if self.bias is None else self.bias
        return products.multiply_grouped(self._store(inputs), self.packed, bias, sorting, inputs.dtype)

    def _store(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The inputs in the order and the type of the weight's columns, and their scales."""
        if self.order is not None:
            inputs = inputs.index_select(-1, self.order)
        kind, group = self._rounding
        return round_inputs(inputs, kind, group, self.inputs_scale) if kind else (inputs, None)


def find_quantised(module: nn.Module, name: str = "weight") -> QuantisedWeight | None:
    """Returns the quantised weight of a parameter, if `HeldWeight` can hold it."""
    weight = get_quantised(module, name)
    return weight if weight is not None and can_hold(weight, getattr(module, name).dtype) else None


def take_quantised(module: nn.Module) -> None:
    """Takes the quantised weights of a module away from it, so that their memory is free when what is made of them is
    all that is left."""
    move_quantised(module, nn.Module())


def hold_experts(model: nn.Module) -> None:
    """Makes the experts of a loaded model whose weights are quantised compute by `HeldWeight`."""
    for module in list(model.modules()):
        if asks_the_interface(module):
            names = (name_up(module), "down_proj")
            held = {name: weight for name in names if (weight := find_quantised(module, name)) is not None}
            if all(get_quantised(module, name) is None or name in held for name in names):
                take_quantised(module)
                for name in list(held):
                    bias = getattr(module, f"{name}_bias") if getattr(module, "has_bias", False) else None
                    setattr(module, HELD + name, HeldWeight(held.pop(name), getattr(module, name).dtype, bias))
