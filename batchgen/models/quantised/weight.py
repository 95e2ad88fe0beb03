"""A weight of 8 or 4 bits in the one form that this project computes with, whatever format its files have.

Each format of `batchgen.models.quantised` is read into this form, and `--dtype fp8`, `int8` and `int4` make it. It is
plain tensors, so that a shard, several layers joined, and the experts of a layer are made by cutting and joining them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

Kind = Literal["fp8", "int8", "int4", "mxfp4"]
"""How a number is stored: float8_e4m3fn; a whole number from -128 to 127, or from 0 to 15; a float of 4 bits, e2m1."""

Inputs = Literal["", "fp8", "int8"]
"""What the inputs of a product are rounded to, with a scale for each token (largest / 448, or 127); "": nothing."""

ZERO_OF_INT4 = 8
"""What is subtracted from a number of 4 bits that has no `zeros`."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The floats of 4 bits, by their bits (OCP Microscaling Formats 1.0, section 5.3.3)."""


@dataclass(frozen=True)
class QuantisedWeight:
    """A matrix [rows, columns] of a linear layer, or those of a layer's experts, [experts, rows, columns].

    A number is `(value - zero) * scale`. `…` below is nothing, or the experts.
    """

    kind: Kind
    values: torch.Tensor
    """[…, rows, columns], float8_e4m3fn or int8; of 4 bits […, rows, columns / 2], uint8: a byte holds two adjacent
    columns, the even one in its low half."""

    scales: torch.Tensor
    """[…, rows, groups]: of each row, one for every `columns / groups` columns. float32, float16 or bfloat16; of mxfp4
    float8_e8m0fnu."""

    zeros: torch.Tensor | None = None
    """[…, rows, groups], uint8: of int4 alone; None: `ZERO_OF_INT4`."""

    order: torch.Tensor | None = None
    """[columns], int32: column `i` is multiplied by the input `order[i]` (GPTQ's act order); None: by the input `i`."""

    inputs: Inputs = ""
    inputs_scale: float | None = None
    """Of all tokens, where a checkpoint fixes it; None: each token has its own."""

    inputs_group: int = 0
    """Numbers of a token that have a scale of their own (128 in FP8 by blocks); 0: all of them have one."""

    @property
    def shape(self) -> torch.Size:
        """[…, rows, columns] of the matrix."""
        per_value = 2 if self.kind in ("int4", "mxfp4") else 1
        return torch.Size([*self.values.shape[:-1], self.values.shape[-1] * per_value])

    @property
    def group(self) -> int:
        """Columns that have a scale together."""
        return -(-self.shape[-1] // self.scales.shape[-1])

    @property
    def nbytes(self) -> int:
        """Of all of its tensors."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def widen(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the matrix that this stands for, […, rows, columns], computed in float32: the reference of kernels.

        Its columns are in the order of the inputs.
        """
        numbers = self._read_values()
        scales = self._spread(self.scales.float())
        if self.kind == "int4":
            zeros = float(ZERO_OF_INT4) if self.zeros is None else self._spread(self.zeros.float())
            numbers = numbers - zeros
        matrix = numbers * scales
        if self.order is not None:
            matrix = torch.empty_like(matrix).index_copy_(-1, self.order.long(), matrix)
        return matrix.to(dtype)

    def round_inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns what the inputs [tokens, columns] of a product become, in float32: the reference of kernels."""
        if not self.inputs:
            return inputs.float()
        most = 448.0 if self.inputs == "fp8" else 127.0
        groups = inputs.float().view(len(inputs), -1, self.inputs_group or inputs.shape[-1])
        scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / most
        if self.inputs_scale is not None:
            scales = torch.full_like(scales, self.inputs_scale)
        rounded = (groups / scales).clamp(-most, most)
        rounded = rounded.to(torch.float8_e4m3fn).float() if self.inputs == "fp8" else rounded.round()
        whole: torch.Tensor = (rounded * scales).flatten(-2)
        return whole

    def to(self, device: torch.device | str) -> QuantisedWeight:
        """Returns a copy on `device`."""
        return self.map(lambda tensor: tensor.to(device))

    def cut_rows(self, begin: int, length: int) -> QuantisedWeight:
        """Returns a view of some rows; those of each expert, if there are several."""
        return self.map(lambda tensor: tensor.narrow(-2, begin, length), also_order=False)

    def cut_columns(self, begin: int, length: int) -> QuantisedWeight:
        """Returns a view of some columns.

        Raises:
            ValueError: they do not begin and end where groups do, or the columns have another order than the inputs.
        """
        group, groups = self.group, self.scales.shape[-1]
        if self.order is not None:
            raise ValueError("its columns are not in the order of the inputs")
        ends = length % group == 0 or begin + length == self.shape[-1]
        if groups > 1 and (begin % group or not ends):
            raise ValueError(f"columns {begin} to {begin + length} do not begin and end with its groups of {group}")
        width = self.shape[-1]

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape[-1] == groups and tensor is not self.values:
                first = begin // group if groups > 1 else 0
                return tensor.narrow(-1, first, -(-length // group) if groups > 1 else 1)
            per_value = width // tensor.shape[-1]
            return tensor.narrow(-1, begin // per_value, length // per_value)

        return self.map(cut, also_order=False)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor], *, also_order: bool = True) -> QuantisedWeight:
        """Returns the same with each tensor changed."""
        order = change(self.order) if self.order is not None and also_order else self.order
        zeros = None if self.zeros is None else change(self.zeros)
        return replace(self, values=change(self.values), scales=change(self.scales), zeros=zeros, order=order)

    def _tensors(self) -> list[torch.Tensor]:
        return [one for one in (self.values, self.scales, self.zeros, self.order) if one is not None]

    def _read_values(self) -> torch.Tensor:
        """The stored numbers in float32, […, rows, columns]."""
        if self.kind in ("fp8", "int8"):
            return self.values.float()
        pairs = torch.stack([self.values & 15, self.values >> 4], -1).flatten(-2)
        if self.kind == "int4":
            return pairs.float()
        return torch.tensor(E2M1, device=pairs.device)[pairs.long()]

    def _spread(self, of_groups: torch.Tensor) -> torch.Tensor:
        """One for each column, of one for each group; the last group may be shorter."""
        return of_groups.repeat_interleave(self.group, -1)[..., : self.shape[-1]]


def join_rows(weights: Sequence[QuantisedWeight]) -> QuantisedWeight | None:
    """Returns one weight that has the rows of several; None: they differ in more than their rows."""
    return _join(weights, lambda tensors: torch.cat(tensors, -2))


def stack_experts(weights: Sequence[QuantisedWeight]) -> QuantisedWeight | None:
    """Returns one weight of several experts; None: they differ in more than their numbers."""
    return _join(weights, lambda tensors: torch.stack(tensors))


def _join(
    weights: Sequence[QuantisedWeight], join: Callable[[list[torch.Tensor]], torch.Tensor]
) -> QuantisedWeight | None:
    first = weights[0]
    if any(_describe(weight) != _describe(first) for weight in weights):
        return None
    if any(not _are_same(weight.order, first.order) for weight in weights):
        return None
    zeros = None if first.zeros is None else join([weight.zeros for weight in weights if weight.zeros is not None])
    values, scales = join([weight.values for weight in weights]), join([weight.scales for weight in weights])
    return replace(first, values=values, scales=scales, zeros=zeros)


def _describe(weight: QuantisedWeight) -> tuple[object, ...]:
    """What must be equal of weights that are joined, but for the order of columns."""
    sizes = weight.values.shape[-1], weight.scales.shape[-1], weight.scales.dtype, weight.zeros is None
    return weight.kind, weight.inputs, weight.inputs_scale, weight.inputs_group, *sizes


def _are_same(order: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if order is None or other is None:
        return order is other
    return torch.equal(order, other)
