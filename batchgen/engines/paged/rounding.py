"""Keys and values of 8 bits: how `--kv-dtype fp8` rounds them, in torch.

Each key of one head of one token, and each value, has a scale of its own, a power of two: the smallest with which no
number of it is above 448, the largest of `float8_e4m3fn`. So

- what is stored of a token depends on that token alone: not on the rows beside it, on how its prompt was cut into
  chunks, nor on what has been computed before. Beginnings can be shared, a preempted row finds the same numbers again,
  and a run that is resumed has the texts of one that was not. A scale by head, chosen from the first prompts, would
  give none of that.
- a power of two takes one byte, its exponent (1/64 to 1/256 of the numbers beside it), and dividing by it rounds
  nothing. A float is as exact with one scale as with another, as long as it is above the smallest ones: for the
  largest number of a key to be 448 and not 250 makes no difference.
- widened numbers are exact in 16 bits, and rounding them again changes nothing.

The step's own tokens are attended to as they are stored, never as they came: else a text would depend on the step that
a token was computed in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

NUMBERS = torch.float8_e4m3fn
NOT_FINITE = 255
"""In the place of an exponent: the key or value holds NaN or infinity."""

_LARGEST_BITS = 0x600000  # of the mantissa of 448, which is 1.75 * 2**8, in float32
_EXPONENT = 8  # of 448
_BIAS = 127  # of the exponents of float32, and of those that are stored


class Rounded(NamedTuple):
    """Keys or values in 8 bits."""

    numbers: torch.Tensor  # [..., size], float8_e4m3fn
    # [...], uint8: the scale of each is 2 ** (exponent - 127), 1 to 254; `NOT_FINITE`: it is none
    exponents: torch.Tensor


def round_numbers(wide: torch.Tensor) -> Rounded:
    """Rounds keys or values [..., size] of any floating type."""
    largest = wide.abs().amax(-1).float()
    # (bits + what 448's mantissa lacks to the next power of two) >> 23: the exponent, plus one beyond that mantissa.
    above = (largest.view(torch.int32) + (0x7FFFFF - _LARGEST_BITS)) >> 23
    exponents = (above - _EXPONENT).clamp(min=1)
    finite = largest.isfinite()
    numbers = torch.ldexp(wide.to(_find_width(wide.dtype)), (_BIAS - exponents)[..., None])
    numbers = numbers.masked_fill(~finite[..., None], 0).to(NUMBERS)
    return Rounded(numbers, exponents.masked_fill(~finite, NOT_FINITE).to(torch.uint8))


def widen_numbers(rounded: Rounded, dtype: torch.dtype) -> torch.Tensor:
    """Returns what was rounded as numbers of type `dtype`, [..., size]; NaN where it was not finite."""
    exponents = rounded.exponents.to(torch.int32)[..., None]
    wide = torch.ldexp(rounded.numbers.to(_find_width(dtype)), exponents - _BIAS).to(dtype)
    return wide.masked_fill_(exponents == NOT_FINITE, torch.nan)


def _find_width(dtype: torch.dtype) -> torch.dtype:
    """The type that numbers of this one are scaled in."""
    return torch.promote_types(dtype, torch.float32)
