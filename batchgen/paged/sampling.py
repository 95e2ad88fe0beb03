"""The next token of each row, on the device: the best one, or one drawn with the row's own random numbers.

The same function and the same numbers as every other engine has (`decoding.choose`, `Prompt.row_seed`), so that a row
is sampled alike whatever it runs beside, and wherever it is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from batchgen.decoding import ELEMENTS_AT_ONCE, choose
from batchgen.paged.step import Sequence


def draw(logits: torch.Tensor, sequences: Rows[Sequence], best: torch.Tensor) -> None:
    """Puts the tokens of sampled rows in the place of the best ones.

    Args:
        logits: [rows or more, vocabulary].
        sequences: of the rows; each draws its next random number.
        best: token ids, [rows or more], changed in place.
    """
    sampled = [row for row, sequence in enumerate(sequences) if sequence.prompt.params.temperature > 0]
    if not sampled:
        return
    params = [sequences[row].prompt.params for row in sampled]
    numbers = [[p.temperature, p.top_p, sequences[row].random.random()] for row, p in zip(sampled, params, strict=True)]
    temperature, top_p, uniform = _there(torch.tensor(numbers, dtype=torch.float64), logits.device).unbind(1)
    rows, top_k = _there(torch.tensor([sampled, [p.top_k for p in params]]), logits.device)
    most_k = max(p.top_k for p in params)
    nucleus = any(p.top_p < 1 for p in params)
    size = max(1, ELEMENTS_AT_ONCE // logits.shape[-1])
    for begin in range(0, len(sampled), size):
        part = slice(begin, begin + size)
        best[rows[part]] = choose(
            logits[rows[part]],
            uniform[part],
            temperature[part],
            top_k=top_k[part],
            most_k=most_k,
            top_p=top_p[part] if nucleus else None,
        )


def _there(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without the host waiting for the device."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
