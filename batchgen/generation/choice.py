"""What `TokenChooser` gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

NOTHING_LEFT = -2
"""In the place of a row's next token: its parameters leave no token that is possible."""


class ChosenLogprob(NamedTuple):
    """The log-probability of one chosen token, and those of the likeliest ones there, read from the device."""

    logprob: float
    top_ids: Sequence[int]  # the best first; at least as many as its row asks for
    top_logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probabilities of chosen tokens, for the rows that ask. All tensors are on the device of the logits."""

    rows: Sequence[int]  # those that ask: positions in the `places` that `choose` was given
    logprobs: torch.Tensor  # of the chosen tokens, float32 [rows that ask]
    top_ids: torch.Tensor  # the likeliest tokens, the best first, int64 [rows that ask, most that a row asks for]
    top_logprobs: torch.Tensor  # theirs, float32, same shape


@dataclass(frozen=True, slots=True)
class Choice:
    """The next tokens of some rows."""

    tokens: torch.Tensor
    """int64 [rows], on the device: as `best` has it where that is negative, `NOTHING_LEFT`, or a token."""
    logprobs: TokenLogprobs | None  # None: no row asks
