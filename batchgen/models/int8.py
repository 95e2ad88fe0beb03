"""Weights of 8 bits: whole numbers from -127 to 127 and a scale for each output row, computed with in the model's type.

`Int8Weight` takes the place of a layer's `weight`, and answers where torch asks for it: in `linear`, `matmul` and
`embedding`. So any layer that uses its weight in one of these ways can have it, DeepSpeed's sharded ones included,
and a tied weight stays tied. Symmetric rounding to the nearest, by rows: the "vector-wise" weights of LLM.int8
(https://arxiv.org/abs/2208.07339, section 2), without its rounding of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_MOST = 127
_BYTES_AT_ONCE = 1 << 28  # of the widened weight that a product needs beside the whole numbers


class Int8Weight(nn.Module):
    """A matrix [rows, columns] in 8 bits a number: `values` as int8 and `scales` [rows, 1] in the type computed in.

    The error of a number is at most half a scale: 1/254 of the largest in its row.
    """

    values: torch.Tensor
    scales: torch.Tensor

    def __init__(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)

    @classmethod
    def rounded(cls, weight: torch.Tensor, dtype: torch.dtype) -> Int8Weight:
        """`weight` [rows, columns], rounded; the products with it will be of type `dtype`."""
        values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scales = torch.empty(len(weight), 1, dtype=dtype, device=weight.device)
        rows = max(1, _BYTES_AT_ONCE // (4 * weight.shape[1]))
        for part, rounded, scale in zip(*(_in_parts(tensor, rows) for tensor in (weight, values, scales)), strict=True):
            exact = part.float()
            scale.copy_(exact.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(dtype).tiny) / _MOST)
            # By the scale as it is stored: it was rounded too.
            rounded.copy_((exact / scale.float()).round_().clamp_(-_MOST, _MOST))
        return cls(values, scales)

    @property
    def shape(self) -> torch.Size:
        """Of the matrix."""
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.values.device

    def transpose(self, first: int, second: int) -> _Transposed:
        """The matrix turned over, for `matmul`."""
        if {first % 2, second % 2} != {0, 1}:
            raise ValueError("a matrix has two dimensions")
        return _Transposed(self)

    def times(self, inputs: torch.Tensor) -> torch.Tensor:
        """`inputs` [..., columns] with each row of the matrix: [..., rows]."""
        rows = max(1, _BYTES_AT_ONCE // (self.values.shape[1] * inputs.element_size()))
        if rows >= self.values.shape[0]:
            return functional.linear(inputs, self.values.to(inputs.dtype)) * self.scales.squeeze(1)
        # A matrix of a whole vocabulary would need as much room again as in 16 bits.
        parts = [functional.linear(inputs, part.to(inputs.dtype)) for part in _in_parts(self.values, rows)]
        return torch.cat(parts, dim=-1) * self.scales.squeeze(1)

    def rows_of(self, indices: torch.Tensor) -> torch.Tensor:
        """The rows of those numbers, [..., columns]."""
        return functional.embedding(indices, self.values) * functional.embedding(indices, self.scales)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _answer(function, args, kwargs or {})


def _in_parts(tensor: torch.Tensor, rows: int) -> Sequence[torch.Tensor]:
    parts: Sequence[torch.Tensor] = tensor.split(rows)  # type: ignore[no-untyped-call]
    return parts


class _Transposed:
    """A matrix in 8 bits, turned over: the right side of a `matmul`."""

    def __init__(self, weight: Int8Weight) -> None:
        self.weight = weight

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _answer(function, args, kwargs or {})


def _answer(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if function is functional.linear:
        inputs, weight, bias = [*args, *kwargs.values(), None][:3]
        product = weight.times(inputs)
        return product if bias is None else product + bias
    if function is torch.matmul and isinstance(args[1], _Transposed):
        return args[1].weight.times(args[0])
    if function is functional.embedding:
        return args[1].rows_of(args[0])
    raise TypeError(f"weights of 8 bits do not take part in {function}")
