"""The log-probability of each token that was chosen, for rows that ask for it.

It is the log of the probability that the model itself gives the token: of the softmax of its raw logits, in float32,
before temperature, top-k and top-p. So vLLM and OpenAI have it, and so a sampled row and a greedy one can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from batchgen.types import Prompt

_ELEMENTS_AT_ONCE = 2**23  # rows x vocabulary handled at once: 32 MiB for each float32 tensor


def log_probabilities(logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the log-probability of one token in each of some rows; waits for no device.

    Args:
        logits: as the model gives them, [all rows or more, vocabulary].
        rows: the indices in `logits` of the rows that ask, int64 [rows].
        tokens: one token id for each of `rows`, int64 [rows].

    Returns:
        Natural logarithms, float32 [rows].
    """
    size = max(1, _ELEMENTS_AT_ONCE // logits.shape[-1])
    logprobs = torch.empty(len(rows), dtype=torch.float32, device=logits.device)
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        some = logits[rows[part]].float()
        logprobs[part] = some.gather(-1, tokens[part, None]).squeeze(-1) - some.logsumexp(-1)
    return logprobs


class Recorder(LogitsProcessor):
    """Lets others choose, and keeps the log-probability of what they have chosen for the rows that ask.

    It stands around them, since they mark the chosen token in the logits, which then are the model's no more.
    """

    def __init__(self, prompts: Sequence[Prompt], choosers: Sequence[LogitsProcessor], device: torch.device) -> None:
        self._row_numbers = [row for row, prompt in enumerate(prompts) if prompt.params.logprobs]
        self._rows = torch.tensor(self._row_numbers, dtype=torch.long, device=device)
        self._all = torch.arange(len(self._row_numbers), device=device)
        self._choosers = choosers
        self._steps: list[torch.Tensor] = []  # [rows that ask] each, on the device

    @property
    def is_needed(self) -> bool:
        """Whether any row asks for log-probabilities."""
        return bool(self._row_numbers)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raw, rows = scores, self._rows
        if self._choosers:
            raw, rows = scores[self._rows], self._all
        for chooser in self._choosers:
            scores = chooser(input_ids, scores)
        self._steps.append(log_probabilities(raw, rows, scores.argmax(-1)[self._rows]))
        return scores

    def read(self) -> dict[int, list[float]]:
        """Returns, for each row that asks, one number for each step, also for the steps after its end."""
        if not self._steps:
            return {}
        return dict(zip(self._row_numbers, torch.stack(self._steps, 1).tolist(), strict=True))
