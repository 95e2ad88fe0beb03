"""Whether sequences fit into the cache until they end. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchgen.paged.pages import SIZE

_CHECKS = 16  # of the peak by one forecast, each of which sorts all sequences


class Forecast:
    """The pages that running sequences will need at most, if each grows by a token a step until it ends.

    Args:
        pages: of the cache.
        lengths: tokens of each sequence now, or soon without a token being generated.
        rests: tokens that each is expected to generate yet.
    """

    def __init__(self, pages: int, lengths: Sequence[int], rests: Sequence[int]) -> None:
        self._pages = pages
        self._lengths, self._rests = list(lengths), list(rests)
        self._most = sum(self._lengths) + sum(self._rests)
        self._checks = 0

    def fits(self, length: int, rest: int) -> bool:
        """Whether a sequence of `length` tokens and `rest` expected ones fits beside them; if so, it runs too."""
        # All at their longest at once: cheap, and enough while the cache is far from full.
        holds = self._in_pages(self._most + length + rest, len(self._lengths) + 1) <= self._pages
        if not holds and self._checks < _CHECKS:
            self._checks += 1
            holds = self._peak(length, rest) <= self._pages
        if holds:
            self._lengths.append(length)
            self._rests.append(rest)
            self._most += length + rest
        return holds

    def _peak(self, length: int, rest: int) -> float:
        """The cache is fullest just before some sequence ends: those that end later have grown by as much, those that
        end sooner are gone."""
        rests = np.array([*self._rests, rest])
        order = np.argsort(-rests, kind="stable")
        there = np.arange(1, len(order) + 1)
        tokens = np.array([*self._lengths, length])[order].cumsum() + there * rests[order]
        return float(self._in_pages(tokens, there).max())

    def _in_pages(self, tokens: np.ndarray | float, sequences: np.ndarray | float) -> np.ndarray | float:
        return tokens / SIZE + 0.5 * sequences  # the last page of each is half full
