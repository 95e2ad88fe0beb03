"""Whether sequences fit into the cache until they end. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchgen.engines.paged.pages import SIZE
from batchgen.engines.paged.step import Ints

_CHECKS = 16  # of the peak by one forecast, each of which sorts all sequences


class Forecast:
    """The pages that running sequences will need at most, if each grows by a token a step until it ends.

    Args:
        pages: of the cache.
        lengths: tokens of each sequence now, or soon without a token being generated.
        rests: tokens that each is expected to generate yet.
    """

    def __init__(self, pages: int, lengths: Ints, rests: Ints) -> None:
        self._pages = pages
        self._lengths, self._rests = lengths, rests
        self._sequences = len(lengths)
        self._most = int(lengths.sum() + rests.sum())
        self._added: list[tuple[int, int]] = []
        self._checks = 0

    def fits(self, length: int, rest: int) -> bool:
        """Whether a sequence of `length` tokens and `rest` expected ones fits beside them; if so, it runs too."""
        # All at their longest at once: cheap, and enough while the cache is far from full.
        holds = bool(_in_pages(self._most + length + rest, self._sequences + 1) <= self._pages)
        if not holds and self._checks < _CHECKS:
            self._checks += 1
            holds = self._peak(length, rest) <= self._pages
        if holds:
            self._added.append((length, rest))
            self._sequences += 1
            self._most += length + rest
        return holds

    def _peak(self, length: int, rest: int) -> float:
        """The cache is fullest just before some sequence ends: those that end later have grown by as much, those that
        end sooner are gone."""
        more = np.array([*self._added, (length, rest)], np.int32)
        self._lengths, self._rests = np.append(self._lengths, more[:, 0]), np.append(self._rests, more[:, 1])
        order = np.argsort(-self._rests, kind="stable")
        there = np.arange(1, len(order) + 1)
        tokens = self._lengths[order].cumsum() + there * self._rests[order]
        self._lengths, self._rests = self._lengths[:-1], self._rests[:-1]
        self._added = []
        return float(_in_pages(tokens, there).max())


def _in_pages(tokens: Any, sequences: Any) -> Any:
    """The last page of a sequence is filled by anything between nothing and all: half on average, with a standard
    deviation of 1/sqrt(12) pages, of which two are allowed for."""
    return tokens / SIZE + 0.5 * sequences + 2 * (sequences / 12) ** 0.5
