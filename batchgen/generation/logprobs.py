"""The log-probability of each token that was chosen, for rows that ask for it.

It is the log of the probability that the model itself gives the token: of the softmax of its raw logits, in float32,
before temperature, penalties, min-p, top-k and top-p. So vLLM and OpenAI have it, and so a sampled row and a greedy one
can be compared. Of a row with a constraint it is that of the softmax over the tokens that the constraint allows, as
vLLM has it.
"""

from __future__ import annotations

import torch

from batchgen.generation.edits import apply_bitmask

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


def find_likeliest(
    logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, count: int, bitmask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Finds the log-probabilities of chosen tokens, and of the likeliest ones beside them; waits for no device.

    Args:
        logits: as the model gives them, [all rows or more, vocabulary].
        rows: the indices in `logits` of the rows that ask, int64 [rows].
        tokens: one token id for each of `rows`, int64 [rows].
        count: of the likeliest tokens; 0 for none.
        bitmask: what constraints allow, as `apply_bitmask` takes it, for each of `rows`; None: there are none.

    Returns:
        Of the tokens, float32 [rows]; the likeliest ids, int64 [rows, count], and theirs, float32 [rows, count].
    """
    size = max(1, _ELEMENTS_AT_ONCE // logits.shape[-1])
    count = min(count, logits.shape[-1])
    logprobs = torch.empty(len(rows), dtype=torch.float32, device=logits.device)
    top_ids = torch.empty((len(rows), count), dtype=torch.long, device=logits.device)
    top = torch.empty((len(rows), count), dtype=torch.float32, device=logits.device)
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        some = logits[rows[part]].float()
        if bitmask is not None:
            apply_bitmask(some, bitmask[part])
        total = some.logsumexp(-1)
        logprobs[part] = some.gather(-1, tokens[part, None]).squeeze(-1) - total
        if count:
            values, top_ids[part] = some.topk(count)
            top[part] = values - total[:, None]
    return logprobs, top_ids, top
