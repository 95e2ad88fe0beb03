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


def score(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the log-probability of a token of each row, and the likeliest tokens of each row with theirs.

    Args:
        logits: float32 [rows, vocabulary].
        tokens: int64 [rows].
        count: of the likeliest tokens, at most the vocabulary; 0 for none.

    Returns:
        As `find_likeliest`.
    """
    total = logits.logsumexp(-1, keepdim=True)
    logprobs = (logits.gather(-1, tokens[:, None]) - total)[:, 0]
    if not count:
        empty = logits.new_empty((len(logits), 0))
        return logprobs, empty.long(), empty
    values, ids = logits.topk(count)
    return logprobs, ids, values - total


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
        logprobs[part], top_ids[part], top[part] = score(some, tokens[part], count)
    return logprobs, top_ids, top
