"""The log-probabilities of the tokens of a prompt, from the logits of a forward over it.

They are the logs of the softmax of the model's raw logits, in float32, as those of generated tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from batchgen.generation.logprobs import score

_ELEMENTS_AT_ONCE = 2**23  # tokens x vocabulary handled at once: 32 MiB for each float32 tensor


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of the tokens of a prompt after its first, before which there is nothing."""

    logprobs: Sequence[float]
    ranks: Sequence[int]  # among all tokens at the same place; the likeliest has 1
    top_ids: Sequence[Sequence[int]]  # the likeliest tokens of each place, the best first
    top_logprobs: Sequence[Sequence[float]]  # theirs


class PromptTensors(NamedTuple):
    """The same numbers of some tokens, on a device or on the way from it."""

    logprobs: torch.Tensor  # float32 [tokens]
    ranks: torch.Tensor  # int64 [tokens]
    top_ids: torch.Tensor  # int64 [tokens, as many of the likeliest as are asked for]
    top_logprobs: torch.Tensor  # float32, same shape


def rank_tokens(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> PromptTensors:
    """Finds the log-probabilities and ranks of tokens among all others at their places; waits for no device.

    Args:
        logits: as the model gives them where each of the tokens comes next, [tokens, vocabulary].
        tokens: int64 [tokens].
        count: of the likeliest tokens of each place; 0 for none.
    """
    size, parts = max(1, _ELEMENTS_AT_ONCE // logits.shape[-1]), []
    for begin in range(0, len(logits), size):
        some = logits[begin : begin + size].float()
        own = tokens[begin : begin + size]
        logprobs, top_ids, top = score(some, own, min(count, some.shape[-1]))
        ranks = (some > some.gather(1, own[:, None])).sum(-1) + 1
        parts.append((logprobs, ranks, top_ids, top))
    return PromptTensors(*map(torch.cat, zip(*parts, strict=True)))


def find_prompt_logprobs(model: Any, tokens: Sequence[int], count: int, device: torch.device) -> PromptLogprobs:
    """Computes the log-probabilities of the tokens of a prompt, and of the likeliest `count` at each place.

    Args:
        model: a causal language model of Transformers.
        tokens: of the prompt, at least one.
        count: of the likeliest tokens; 0 for none.
        device: where token ids go.
    """
    if len(tokens) < 2:
        return PromptLogprobs([], [], [], [])
    ids = torch.tensor([list(tokens)], device=device)
    with torch.inference_mode():
        logits = model(input_ids=ids[:, :-1], attention_mask=torch.ones_like(ids[:, :-1]), use_cache=False).logits[0]
        found = rank_tokens(logits, ids[0, 1:].to(logits.device), count)
    return PromptLogprobs(*(numbers.tolist() for numbers in found))
