"""Weights of 8 and 4 bits made of those of 16 bits, while a model is loaded or when it is saved.

None of these needs example inputs: a weight is rounded by its own numbers alone, so that a part of it (a rank's rows,
an expert) is rounded to the same numbers as the whole.

- fp8: float8_e4m3fn with a scale for each row; inputs are rounded by token. The recipe "FP8_DYNAMIC" of llm-compressor.
- int8: whole numbers with a scale for each row; inputs are rounded by token ("W8A8").
- int4: 0 to 15 with a scale and a zero for each group of columns; inputs are not rounded ("W4A16"). Of several spans of
  a group, that with the least sum of squared errors is taken: numbers beyond the span become its ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from batchgen.models.quantised.weight import QuantisedWeight

Rounded = Literal["fp8", "int8", "int4"]

DTYPES: tuple[Rounded, ...] = ("fp8", "int8", "int4")
"""What `--dtype` calls them."""

GROUP_SIZES = (128, 64, 32)
"""Columns that share a scale in int4; unless it is given, the first of these that divides all matrices is taken."""

_MOST_FP8 = 448.0  # of float8_e4m3fn (OCP 8-bit Floating Point Specification 1.0, table 1)
_MOST_INT8 = 127.0
_MOST_INT4 = 15.0
_SPANS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group, as shares of its own
_NUMBERS_AT_ONCE = 1 << 25  # in float32, of which a few copies are made


@dataclass(frozen=True)
class Scheme:
    """How weights are rounded."""

    kind: Rounded
    group_size: int = 0
    """Of int4, columns that share a scale; 0: `fit` chooses. The others have a scale for each row."""

    def __post_init__(self) -> None:
        if self.group_size < 0 or self.group_size % 8:
            raise ValueError(f"a group of {self.group_size} columns: must be a multiple of 8")
        if self.group_size and self.kind != "int4":
            raise ValueError(f"{self.kind} has a scale for each row, and no groups of columns: int4 has")

    @classmethod
    def of(cls, dtype: str, group_size: int = 0) -> Scheme | None:
        """Returns the scheme that `--dtype` calls so; None: it is a type that is not rounded here."""
        found = next((kind for kind in DTYPES if kind == dtype), None)
        return None if found is None else cls(found, group_size)

    def fit(self, columns: Iterable[int]) -> Scheme:
        """Returns the scheme with a group size that divides all of `columns`, the widths of the matrices.

        Raises:
            ValueError: the group size that was given does not, or none of `GROUP_SIZES` does.
        """
        widths = sorted(set(columns))
        if self.kind != "int4" or not widths:
            return self
        if self.group_size == 0:
            return replace(self, group_size=_choose_group_size(widths))
        if odd := next((width for width in widths if width % self.group_size), None):
            raise ValueError(
                f"groups of {self.group_size} columns do not divide the {odd} columns of one of the matrices"
            )
        return self


def _choose_group_size(widths: list[int]) -> int:
    found = next((size for size in GROUP_SIZES if not any(width % size for width in widths)), None)
    if found is None:
        odd = next(width for width in widths if width % GROUP_SIZES[-1])
        raise ValueError(
            f"one of the matrices has {odd} columns, which no group of {', '.join(map(str, GROUP_SIZES))} divides"
        )
    return found


def round_weight(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantisedWeight:
    """Rounds a matrix [rows, columns], or those of experts [experts, rows, columns], where they lie.

    Besides the result it needs memory for a few slices in float32, however large the matrix is.

    Args:
        scheme: with a group size that divides the columns, if it has groups.
        dtype: of the scales of int4; of the others they are float32, since 16 bits can be too few for their range.
    """
    matrix = weight.reshape(-1, weight.shape[-1])
    rows = max(1, _NUMBERS_AT_ONCE // matrix.shape[1])
    parts = [_ROUND[scheme.kind](part.float(), scheme, dtype) for part in matrix.split(rows)]  # type: ignore[no-untyped-call]
    leading = weight.shape[:-1]
    values = torch.cat([part.values for part in parts]).view(*leading, -1)
    scales = torch.cat([part.scales for part in parts]).view(*leading, -1)
    found = [part.zeros for part in parts if part.zeros is not None]
    zeros = torch.cat(found).view(*leading, -1) if found else None
    inputs: Literal["", "fp8", "int8"] = "" if scheme.kind == "int4" else scheme.kind
    return QuantisedWeight(scheme.kind, values, scales, zeros, inputs=inputs)


class _Part(NamedTuple):
    """Some rows, rounded; as in `QuantisedWeight`."""

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


def _round_to_fp8(matrix: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> _Part:
    scales = _find_row_scales(matrix, _MOST_FP8)
    # Older versions of torch make NaN of what is beyond the largest number.
    return _Part((matrix / scales).clamp_(-_MOST_FP8, _MOST_FP8).to(torch.float8_e4m3fn), scales, None)


def _round_to_int8(matrix: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> _Part:
    scales = _find_row_scales(matrix, _MOST_INT8)
    return _Part((matrix / scales).round_().clamp_(-_MOST_INT8, _MOST_INT8).to(torch.int8), scales, None)


def _find_row_scales(matrix: torch.Tensor, largest: float) -> torch.Tensor:
    return (matrix.abs().amax(1, keepdim=True) / largest).clamp_(min=torch.finfo(torch.float32).tiny)


def _round_to_int4(matrix: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> _Part:
    groups = matrix.view(len(matrix), -1, scheme.group_size)
    low, high = groups.amin(-1, keepdim=True).clamp_(max=0), groups.amax(-1, keepdim=True).clamp_(min=0)
    least = torch.full_like(low, torch.inf)
    # Where a number of the group is not finite no span is better: the rounded ones are not, either.
    scales, zeros = torch.full_like(low, torch.nan), torch.zeros_like(low)
    for span in _SPANS:
        scale = ((high - low) * (span / _MOST_INT4)).clamp_(min=torch.finfo(dtype).tiny).to(dtype).float()
        zero = (-low * span / scale).round_().clamp_(0, _MOST_INT4)
        error = (((_count(groups, scale, zero).sub_(zero)).mul_(scale)).sub_(groups)).square_().sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    whole = _count(groups, scales, zeros).nan_to_num_(0).to(torch.uint8).flatten(1)
    values = whole[:, 0::2] | (whole[:, 1::2] << 4)
    return _Part(values, scales.squeeze(-1).to(dtype), zeros.squeeze(-1).to(torch.uint8))


def _count(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Returns the numbers of 0 to 15 that stand for those of groups."""
    return (groups / scale).add_(zero).round_().clamp_(0, _MOST_INT4)


_ROUND: dict[str, Callable[[torch.Tensor, Scheme, torch.dtype], _Part]] = {
    "fp8": _round_to_fp8,
    "int8": _round_to_int8,
    "int4": _round_to_int4,
}
