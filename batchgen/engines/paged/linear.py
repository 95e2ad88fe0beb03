"""Matrix products of linear layers: those of the same input as one, and those of few tokens by a kernel of our own.

One product of many columns keeps a GPU busier than several of few: a product of 2,048 tokens and 1,024 columns is one
of 64 tiles, on 132 multiprocessors. Which kernel it is depends on the number of tokens, which the compiler leaves open;
so the product is an operator that decides when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def join(module: nn.Module, names: Sequence[str]) -> None:
    """Linear layers of `module` become one product, if it has all of them and they are plain ones.

    Args:
        names: in the order in which the model calls them, each time all of them and with the same input.
    """
    layers = [getattr(module, name, None) for name in names]
    if not all(type(layer) is nn.Linear for layer in layers):
        return
    first = _First([layer for layer in layers if isinstance(layer, nn.Linear)])
    for number, name in enumerate(names):
        setattr(module, name, _Next(first, number, last=number == len(names) - 1) if number else first)


def exchange(module: nn.Module) -> None:
    """Plain linear layers of `module`, itself included, compute by `product`."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = _Linear


def product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `torch.nn.functional.linear`: [..., depth] and [columns, depth] to [..., columns]."""
    if inputs.device.type != "cuda":
        return F.linear(inputs, weight, bias)
    found: torch.Tensor = torch.ops.batchgen.product(inputs, weight, bias)
    return found


def _product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    from batchgen.engines.paged import skinny_gemm  # Triton comes with a torch for GPUs alone

    rows = inputs.reshape(-1, inputs.shape[-1])
    if skinny_gemm.covers(rows, weight):
        return skinny_gemm.product(rows, weight, bias).view(*inputs.shape[:-1], len(weight))
    return F.linear(inputs, weight, bias)


def _shape(inputs: torch.Tensor, weight: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    return inputs.new_empty((*inputs.shape[:-1], weight.shape[0]))


_library = torch.library.Library("batchgen", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("product(Tensor inputs, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("product", _product, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("batchgen::product", _shape, lib=_library)


class _Linear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return product(input, self.weight, self.bias)


class _First(nn.Module):
    """Computes for all of them."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self._sizes = [layer.out_features for layer in layers]
        self.weight = nn.Parameter(torch.cat([layer.weight.data for layer in layers]), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if any(layer.bias is not None for layer in layers):
            biases = [_bias(layer) for layer in layers]
            self.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        self.found: tuple[torch.Tensor, ...] = ()  # while the others are still to be called

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.found = torch.split(product(inputs, self.weight, self.bias), self._sizes, -1)
        return self.found[0]


class _Next(nn.Module):
    """Takes what the first has found for it."""

    def __init__(self, first: _First, number: int, *, last: bool) -> None:
        super().__init__()
        self._first = [first]  # in a list, so that its weights are not this one's too
        self._number, self._last = number, last

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found = self._first[0].found[self._number]
        if self._last:
            self._first[0].found = ()
        return found


def _bias(layer: nn.Linear) -> torch.Tensor:
    return layer.weight.data.new_zeros(layer.out_features) if layer.bias is None else layer.bias.data
