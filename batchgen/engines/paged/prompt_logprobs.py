"""The log-probabilities of the tokens of prompts, for rows that ask: from the hidden states of the prefill.

Such a row computes all of its prompt itself, and takes no page of it from another row (`scheduler`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np
import torch

from batchgen.engines.paged.step import Step
from batchgen.engines.paged.step_buffers import StepBuffers
from batchgen.generation.prompt_logprobs import PromptTensors, rank_tokens

_TOKENS_AT_ONCE = 256  # whose logits are made together: 64 MB of a vocabulary of 128,256 in bfloat16


def find_prompt_logprobs(
    step: Step, hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], buffers: StepBuffers
) -> PromptTensors | None:
    """Finds the log-probabilities of a step's prompt tokens; all ranks that hold the model call this together.

    Args:
        step: as it was planned, or as another rank has told of it.
        hidden: of its tokens, [tokens or more, hidden size].
        head: makes logits of them.
        buffers: of the steps, which bring the numbers to the host.

    Returns:
        Of `step.prompt_rows`, numbers that are there once the step has been made; None: there are none, or another rank
        has planned the step.
    """
    if not len(step.prompt_rows):
        return None
    targets = chain.from_iterable(part.sequence.tokens[part.begin : part.end] for part in step.prompt_parts)
    tokens = buffers.send(torch.tensor(list(targets), dtype=torch.long))
    count = max((part.sequence.prompt.params.prompt_logprobs or 0 for part in step.prompt_parts), default=0)
    places = buffers.send(torch.from_numpy(step.prompt_rows.astype(np.int64)))
    found = []
    for begin in range(0, len(places), _TOKENS_AT_ONCE):
        some = slice(begin, begin + _TOKENS_AT_ONCE)
        logits = head(hidden[places[some]])  # which the ranks make together
        if step.prompt_parts:
            found.append(rank_tokens(logits, tokens[some], count))
    return PromptTensors(*(buffers.fetch(torch.cat(parts)) for parts in zip(*found, strict=True))) if found else None
