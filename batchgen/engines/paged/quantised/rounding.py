"""Rounds the inputs of a product to the 8 bits that its weight asks for.

Plain operations of torch, so that the compiler makes them part of the norm or the gate that the inputs come from.
"""

from __future__ import annotations

import torch

_LARGEST = {"fp8": 448.0, "int8": 127.0}
_SMALLEST = 1e-12  # of the largest number of a token, so that zeros have a scale, too


def round_inputs(
    inputs: torch.Tensor, kind: str, group: int = 0, fixed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the same numbers as `QuantisedWeight.round_inputs`, as stored numbers and scales.

    Args:
        inputs: [..., columns].
        kind: "fp8" or "int8".
        group: columns that have a scale of their own; 0: all of them have one.
        fixed: the scale, float32 of no dimensions; None: that of the largest number.

    Returns:
        [..., columns], float8_e4m3fn or int8; [..., groups], float32.
    """
    most = _LARGEST[kind]
    numbers = inputs.float()
    if group:
        numbers = numbers.view(*inputs.shape[:-1], inputs.shape[-1] // group, group)
    if fixed is None:
        scales = numbers.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST) / most
    else:
        scales = fixed.expand(numbers[..., :1].shape)
    rounded = (numbers / scales).clamp(-most, most)
    stored = rounded.to(torch.float8_e4m3fn) if kind == "fp8" else rounded.round().to(torch.int8)
    return (stored.flatten(-2), scales.squeeze(-1)) if group else (stored, scales)


def widen_inputs(stored: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Returns the numbers, in float32, that rounded inputs and their scales stand for; inputs as they are: None."""
    if scales is None:
        return stored.float()
    groups = stored.float().view(*scales.shape, stored.shape[-1] // scales.shape[-1])
    return (groups * scales[..., None]).flatten(-2)
