"""What a row's parameters change in its logits before a token is chosen: functions of tensors.

The definitions and their order are those of vLLM's V1 sampler: tokens that are not allowed, then the bias, then the
penalties for repetition, frequency and presence. With logits l, and c the number of times that a token is in the text
generated so far:

* bias: l + b, where b is minus infinity for a token that is not allowed;
* repetition r, for tokens of the prompt and of the text: l / r if l > 0, else l * r;
* frequency f and presence p, for tokens of the text: l - f * c, and l - p where c > 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from batchgen.generation.sampling import send
from batchgen.types import SamplingParams

IN_PROMPT = 1
"""Of a number in `seen`: the token is in the prompt."""

ONE_MORE = 2
"""Of a number in `seen`: what it grows by with each time that the token is generated."""

MOST_SEEN = 2**15 - 1
"""The largest number of int16: counts stay where they are from 16,382 on."""


@dataclass(frozen=True, slots=True)
class EditTensors:
    """What is changed in the logits of some rows, on their device."""

    seen: (
        torch.Tensor | None
    )  # int16 [rows of the pool, vocabulary]: twice the count, and 1 for the prompt; None: unused
    seen_rows: torch.Tensor  # [rows], int64: which row of `seen` is a row's
    repetition: torch.Tensor  # [rows], float32; 1 is off
    frequency: torch.Tensor  # [rows], float32; 0 is off
    presence: torch.Tensor  # [rows], float32; 0 is off
    bias: torch.Tensor | None  # float32 [rows of the pool, vocabulary]; None: no row has one
    bias_rows: torch.Tensor  # [rows], int64: which row of `bias` is a row's

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        seen: tuple[torch.Tensor | None, Sequence[int]],
        bias: tuple[torch.Tensor | None, Sequence[int]],
        device: torch.device,
    ) -> EditTensors:
        """Returns the edits of rows with these parameters; `seen` and `bias` are pools, each with the rows' rows."""
        numbers = [[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for p in params]
        repetition, frequency, presence = send(torch.tensor(numbers, dtype=torch.float32).T.contiguous(), device)
        rows = send(torch.tensor([seen[1], bias[1]]), device)
        return cls(seen[0], rows[0], repetition, frequency, presence, bias[0], rows[1])


def edit_logits(logits: torch.Tensor, edits: EditTensors) -> None:
    """Adds the bias and subtracts the penalties, in place.

    Args:
        logits: float32 [rows, vocabulary]; minus infinity stays what it is.
        edits: of the same rows.
    """
    if edits.bias is not None:
        logits += edits.bias[edits.bias_rows]
    if edits.seen is not None:
        seen = edits.seen[edits.seen_rows]
        repetition = torch.where(seen > 0, edits.repetition[:, None], 1.0)
        logits.copy_(torch.where(logits > 0, logits / repetition, logits * repetition))
        logits -= edits.frequency[:, None] * (seen >> 1)
        logits -= edits.presence[:, None] * (seen > IN_PROMPT)


def apply_bitmask(logits: torch.Tensor, bitmask: torch.Tensor) -> None:
    """Makes the tokens impossible whose bit is not set, in place; also those beyond the last bit.

    Args:
        logits: [rows, vocabulary], floating.
        bitmask: int32 [rows, words]; bit i of word w, from the lowest, is token 32 * w + i.
    """
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((bitmask[:, :, None] >> bits) & 1).flatten(1)[:, : logits.shape[1]].bool()
    logits[:, : allowed.shape[1]].masked_fill_(~allowed, -torch.inf)
    logits[:, allowed.shape[1] :] = -torch.inf


def count_tokens(seen: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> None:
    """Counts one more generated token in each of some rows of `seen`, in place.

    Args:
        seen: int16 [rows of the pool, vocabulary].
        rows: int64 [rows], each of them once.
        tokens: int64 [rows]; one below 0 is no token, and counts for token 0 of a row that has failed.
    """
    tokens = tokens.clamp(min=0)
    before = seen[rows, tokens]
    seen[rows, tokens] = torch.where(before > MOST_SEEN - ONE_MORE, before, before + ONE_MORE)
