"""How many tokens a step takes, once all prompts have come in. Pure.

As many steps remain as the longest sequence has tokens to generate. With all prompts computed as soon as may be, the
last of those steps have a few sequences in them, and still take as long as it takes to read the weights. So prompts
wait, but not so long that they would end later than the longest, and their prefill is spread over the steps.
"""

from __future__ import annotations

import math

import numpy as np

from batchgen.engines.paged.layer_groups import LayerGroups
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.step import Ints

_FULL = 0.5  # of the cache, on the average over the remaining steps: beyond it, waiting would leave a part unused
_SMALLEST = 512  # tokens of a step: an H100 multiplies 43,000 a second of this many, and 48,000 of 2,048


class PrefillBudget:
    """Spreads the prefill of sequences that wait, sorted by what they may generate, the next one last.

    Args:
        lengths: [sequences], tokens of their prompts.
        max_new_tokens: [sequences], tokens they may generate.
        pages: how many the cache has for tokens in all layers.
        groups: of the model's layers.
    """

    def __init__(self, lengths: Ints, max_new_tokens: Ints, pages: int, groups: LayerGroups) -> None:
        self._lengths = lengths
        self._tokens_before = np.concatenate([[0], lengths.cumsum()])
        self._cache_tokens, self._groups = pages * groups.count * PAGE_SIZE, groups  # tokens in one group of layers
        self.max_new_tokens = max_new_tokens

    def choose_step_tokens(self, remaining: Ints, running: Ints, running_remaining: Ints, planned: int) -> int | None:
        """Most tokens of the next step; None: as many as any step may have.

        Args:
            remaining: [sequences], tokens that those which still wait are expected to generate.
            running: [sequences], tokens of those that run.
            running_remaining: [sequences], what they are expected to generate yet.
            planned: tokens that the step has already.
        """
        steps = max(int(running_remaining.max(initial=0)), int(remaining.max()))
        lengths = self._lengths[: len(remaining)]
        held = self._sum_tokens(lengths, remaining) + self._sum_tokens(running, running_remaining)
        if held > _FULL * self._cache_tokens * steps:
            return None
        # All prompts down to each one, in the steps that remain until it has to begin.
        waiting = self._tokens_before[len(remaining)] - self._tokens_before[: len(remaining)]
        needed = planned + float((waiting / np.maximum(1, steps - remaining)).max())
        # The nearest power of two: its products come in tiles that fill whole rounds of a GPU's multiprocessors. 1,024
        # tokens take 128 of an H100's 132 in Llama-8B's products of 4,096 columns, 1,280 take it two rounds.
        return max(_SMALLEST, 1 << round(math.log2(max(1.0, needed))))

    def _sum_tokens(self, lengths: Ints, remaining: Ints) -> float:
        """Tokens in the cache, summed over groups and over the steps of sequences that grow by one in each until they
        end."""
        return float((self._groups.count_cached_tokens(lengths + remaining / 2) * remaining).sum())
