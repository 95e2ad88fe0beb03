"""Linear layers of a patched model: those of the same input as one, and those of few tokens by a kernel of our own.

One product of many columns keeps a GPU busier than several of few: a product of 2,048 tokens and 1,024 columns is one
of 64 tiles, on 132 multiprocessors. Which kernel computes it depends on the number of tokens, which the compiler leaves
open; so the product is an operator that decides when it runs. Where rows have adapters of their own, the operator adds
what these add, if a token of the step has one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from batchgen.engines.paged import adapters
from batchgen.engines.paged.adapters import LayerAdapters
from batchgen.engines.paged.quantised.held import HeldWeight, find_quantised, take_quantised
from batchgen.models.quantised.places import get_quantised
from batchgen.models.quantised.selection import is_linear
from batchgen.models.quantised.weight import QuantisedWeight, join_rows

# Warning: `join_layers` and `replace_layers` patch modules that Transformers has made.
#
# Why: to compute one product instead of several, and products of few tokens by `skinny_gemm`, in models whose code is
# not ours.
#
# What breaks:
# - `join_layers` replaces q_proj, k_proj, v_proj, gate_proj and up_proj by modules that depend on each other. If a
#   version of Transformers calls them in another order, with different inputs, or only some of them, each gets the
#   result of another call, and the text is wrong: `models.trial` finds it at load.
# - The weights of the joined layers have other names: the patched model can be neither saved nor loaded into.
# - `replace_layers` sets `__class__`. It takes plain `nn.Linear` alone, since a subclass has a `forward` of its own,
#   which would be lost. Of quantised weights it takes Conv1D and FalconLinear, too; with adapters Conv1D and all
#   subclasses: `batchgen.models.lora` refuses at load those that compute more than a product.
# - Layers may have adapters (`adapters.set_adapters`). What computes with the weight of such a layer without calling
#   it has no adapter, and the text is wrong: `models.patching` looks at load whether each of them is called.


def join_layers(module: nn.Module, names: Sequence[str]) -> None:
    """Makes one product of linear layers of `module`, if it has all of them and they are plain ones.

    Args:
        names: in the order in which the model calls them, each time all of them and with the same input.
    """
    layers = [layer for name in names if type(layer := getattr(module, name, None)) is nn.Linear]
    if len(layers) < len(names):
        return
    weights = [weight for layer in layers if (weight := find_quantised(layer)) is not None]
    whole = join_rows(weights) if len(weights) == len(layers) else None
    if whole is None and any(get_quantised(layer) is not None for layer in layers):  # these differ in more than rows
        return
    joined = _JoinedLinear(layers, whole)
    for number, name in enumerate(names):
        setattr(module, name, _JoinedOutput(joined, number, number == len(names) - 1) if number else joined)


def replace_layers(module: nn.Module) -> None:
    """Makes plain linear layers of `module`, itself included, compute by `multiply`, and those with adapters with
    these; linear layers of any class whose weights are quantised compute by `HeldWeight`.
    """
    for layer in list(module.modules()):
        if not isinstance(layer, nn.Linear | Conv1D) or isinstance(layer, _QuantisedLinear | _QuantisedConv1D):
            continue
        if is_linear(layer) and (weight := find_quantised(layer)) is not None:
            layer.__class__ = _QuantisedConv1D if isinstance(layer, Conv1D) else _QuantisedLinear
            layer.held = HeldWeight(weight, layer.weight.dtype, layer.bias)
            take_quantised(layer)
        elif adapters.get_adapters(layer) is not None:
            layer.__class__ = _AdaptedConv1D if isinstance(layer, Conv1D) else _AdaptedLinear
        elif type(layer) is nn.Linear:
            layer.__class__ = _OwnLinear


def multiply(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `torch.nn.functional.linear`: [..., depth] and [columns, depth] to [..., columns]."""
    if inputs.device.type != "cuda":
        return F.linear(inputs, weight, bias)
    output: torch.Tensor = torch.ops.batchgen.product(inputs, weight, bias)
    return output


def multiply_adapted(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, given: LayerAdapters | None
) -> torch.Tensor:
    """As `multiply`, with what each token's adapter adds."""
    if given is None:
        return multiply(inputs, weight, bias)
    output: torch.Tensor = torch.ops.batchgen.adapted_product(inputs, weight, bias, *given)
    return output


def _multiply_adapted(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    """The operator's implementation."""
    output = multiply(inputs, weight, bias)
    adapters.add_to(output, inputs, LayerAdapters(down, up))
    return output


def _multiply(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The operator's implementation."""
    from batchgen.engines.paged import skinny_gemm  # Triton comes with a torch for GPUs alone

    rows = inputs.reshape(-1, inputs.shape[-1])
    if skinny_gemm.covers(rows, weight):
        return skinny_gemm.multiply(rows, weight, bias).view(*inputs.shape[:-1], len(weight))
    return F.linear(inputs, weight, bias)


def _make_output(inputs: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
    return inputs.new_empty((*inputs.shape[:-1], weight.shape[0]))


_library = torch.library.Library("batchgen", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("product(Tensor inputs, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("product", _multiply, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("batchgen::product", _make_output, lib=_library)
_library.define(  # type: ignore[no-untyped-call]
    "adapted_product(Tensor inputs, Tensor weight, Tensor? bias, Tensor down, Tensor up) -> Tensor"
)
_library.impl("adapted_product", _multiply_adapted, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("batchgen::adapted_product", _make_output, lib=_library)


class _OwnLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return multiply(input, self.weight, self.bias)


class _QuantisedLinear(nn.Linear):
    held: HeldWeight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.held.multiply(input, self.bias, adapters.get_adapters(self))


class _QuantisedConv1D(Conv1D):
    """Its quantised weight is [columns, depth], as that of any other layer."""

    held: HeldWeight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.held.multiply(inputs, self.bias, adapters.get_adapters(self))


class _AdaptedLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return multiply_adapted(input, self.weight, self.bias, adapters.get_adapters(self))


class _AdaptedConv1D(Conv1D):
    """GPT-2's layers, which keep the weight as [depth, columns]."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return multiply_adapted(inputs, self.weight.T, self.bias, adapters.get_adapters(self))


class _JoinedLinear(nn.Module):
    """Stands in the place of the first of several layers, and computes for all of them.

    Args:
        quantised: the weights of all of them; None: they are plain ones.
    """

    def __init__(self, layers: Sequence[nn.Linear], quantised: QuantisedWeight | None) -> None:
        super().__init__()
        self._sizes = [layer.out_features for layer in layers]
        self.bias: nn.Parameter | None = None
        if any(layer.bias is not None for layer in layers):
            biases = [_find_bias(layer) for layer in layers]
            self.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        self.weight: nn.Parameter | None = None
        self.held: HeldWeight | None = None
        if quantised is None:
            self.weight = nn.Parameter(torch.cat([layer.weight.data for layer in layers]), requires_grad=False)
        else:
            for layer in layers:
                take_quantised(layer)  # their memory is free when this returns
            self.held = HeldWeight(quantised, layers[0].weight.dtype, self.bias)
        adapters.set_adapters(self, adapters.join([adapters.get_adapters(layer) for layer in layers], self._sizes))
        self.outputs: tuple[torch.Tensor, ...] = ()  # of all the layers, while others are still to be called

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.outputs = torch.split(self._multiply(inputs), self._sizes, -1)
        return self.outputs[0]

    def _multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        given = adapters.get_adapters(self)
        if self.held is not None:
            return self.held.multiply(inputs, self.bias, given)
        assert self.weight is not None
        return multiply_adapted(inputs, self.weight, self.bias, given)


class _JoinedOutput(nn.Module):
    """Stands in the place of another of the layers, and returns what the joined one has computed for it."""

    def __init__(self, joined: _JoinedLinear, number: int, is_last: bool) -> None:
        super().__init__()
        self._joined = [joined]  # in a list, so that its weights are not this one's too
        self._number, self._is_last = number, is_last

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output = self._joined[0].outputs[self._number]
        if self._is_last:
            self._joined[0].outputs = ()
        return output


def _find_bias(layer: nn.Linear) -> torch.Tensor:
    return layer.weight.data.new_zeros(layer.out_features) if layer.bias is None else layer.bias.data
