"""How many tokens of waiting prompts a step takes, once all prompts are known. Pure.

As many steps are left as the longest sequence has tokens to generate. With all prompts computed as soon as may be, the
last of those steps have a few sequences in them, and still take as long as it takes to read the weights. So prompts
wait, but not so long that they would end later than the longest, and the sequences are spread over the steps.
"""

from __future__ import annotations

import math

import numpy as np

from batchgen.engines.paged.step import Ints

_FULL = 0.5  # of the cache, on the average over the steps that are left: beyond it, waiting would leave a part unused
_LEAST = 512  # tokens of a step: an H100 multiplies 43,000 a second of so many, and 48,000 of 2,048


class Spread:
    """Those that wait, sorted by what they may generate, the next one last.

    Args:
        lengths: tokens of their prompts.
        most: tokens they may generate.
        cache: tokens that it holds.
    """

    def __init__(self, lengths: Ints, most: Ints, cache: int) -> None:
        self._lengths = lengths
        self._before = np.concatenate([[0], lengths.cumsum()])
        self._cache = cache
        self.most = most

    def tokens(self, rests: Ints, running: Ints, running_rests: Ints, planned: int) -> int | None:
        """Most tokens of the next step; None: as many as any step may have.

        Args:
            rests: tokens that those which still wait are expected to generate.
            running: tokens of those that run.
            running_rests: what they are expected to generate yet.
            planned: tokens that the step has already.
        """
        steps = max(int(running_rests.max(initial=0)), int(rests.max()))
        lengths = self._lengths[: len(rests)]
        if _held(lengths, rests) + _held(running, running_rests) > _FULL * self._cache * steps:
            return None
        # All prompts down to each one, in the steps that are left until it has to begin.
        waiting = self._before[len(rests)] - self._before[: len(rests)]
        needed = planned + float((waiting / np.maximum(1, steps - rests)).max())
        # The nearest power of two: its products come in tiles that fill whole rounds of a GPU's multiprocessors. 1,024
        # tokens take 128 of an H100's 132 in Llama-8B's products of 4,096 columns, 1,280 take it two rounds.
        return max(_LEAST, 1 << round(math.log2(max(1.0, needed))))


def _held(lengths: Ints, rests: Ints) -> float:
    """Tokens in the cache, summed over the steps of sequences that grow by one in each until they end."""
    return float(((lengths + rests / 2) * rests).sum())
