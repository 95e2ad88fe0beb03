"""Whether a waiting sequence may be admitted: whether all that run will fit into the cache until they end. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchgen.engines.paged.layer_groups import ONE_GROUP, LayerGroups
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.step import Ints

_CHECKS = 16  # of the peak by one forecast, each of which sorts all sequences
_LEARN_FROM = 64  # rows that must have ended before their lengths are believed
_SMALLEST_SHARE = 0.05


class ExpectedLengths:
    """How many tokens sequences are expected to generate.

    Args:
        share: of its max_new_tokens that a sequence is expected to generate; None: it is learnt as sequences end.
    """

    def __init__(self, share: float | None) -> None:
        self._share, self._learns = 1.0 if share is None else share, share is None
        self._finished = self._generated_tokens = self._max_new_tokens = 0

    def learn(self, generated_tokens: int, max_new_tokens: int) -> None:
        """A sequence has ended after this many of its tokens."""
        self._finished += 1
        self._generated_tokens += generated_tokens
        self._max_new_tokens += max_new_tokens
        if self._learns and self._finished >= _LEARN_FROM:
            self._share = max(_SMALLEST_SHARE, min(1.0, self._generated_tokens / self._max_new_tokens))

    def expect(self, max_new_tokens: Ints, remaining: Ints) -> Ints:
        """Tokens that sequences will generate from now on, [sequences], if `remaining` of `max_new_tokens` are left."""
        expected = np.rint(max_new_tokens * self._share).astype(np.int32) - (max_new_tokens - remaining)
        clipped: Ints = np.clip(expected, np.minimum(remaining, PAGE_SIZE), remaining)
        return clipped


class CacheForecast:
    """The pages that running sequences will need at most, if each grows by a token a step until it ends.

    In groups with a window, a sequence counts from the beginning with all pages that it will ever have at once.

    Args:
        pages: how many the cache has for tokens in all layers.
        lengths: [sequences], tokens of each now, or soon without a token being generated.
        remaining: [sequences], tokens that each is expected to generate yet.
        groups: of the model's layers.
    """

    def __init__(self, pages: int, lengths: Ints, remaining: Ints, groups: LayerGroups = ONE_GROUP) -> None:
        self._pages, self._groups = pages * groups.count, groups
        self._lengths, self._remaining = lengths, remaining
        self._sequences = len(lengths)
        self._tokens = int(lengths.sum() + remaining.sum())  # with all of them at their longest
        self._windows = int(self._count_window_columns(lengths + remaining).sum())  # pages of a group with a window
        self._admitted: list[tuple[int, int]] = []  # since the peak was last worked out
        self._checks = 0

    def admit(self, length: int, remaining: int) -> bool:
        """Whether a sequence of `length` tokens and `remaining` expected ones fits beside them; if so, it runs too."""
        # All at their longest at once: cheap, and enough while the cache is far from full.
        within = min(-(-(length + remaining) // PAGE_SIZE), self._groups.window_columns)
        pages = self._estimate_pages(self._tokens + length + remaining, self._sequences + 1, self._windows + within)
        fits = bool(pages <= self._pages)
        if not fits and self._checks < _CHECKS:
            self._checks += 1
            fits = self._estimate_peak(length, remaining) <= self._pages
        if fits:
            self._admitted.append((length, remaining))
            self._sequences += 1
            self._tokens += length + remaining
            self._windows += within
        return fits

    def _estimate_peak(self, length: int, remaining: int) -> float:
        """The cache is fullest just before some sequence ends: those that end later have grown by as much, those that
        end sooner are gone."""
        more = np.array([*self._admitted, (length, remaining)], np.int32)
        self._lengths, self._remaining = np.append(self._lengths, more[:, 0]), np.append(self._remaining, more[:, 1])
        order = np.argsort(-self._remaining, kind="stable")
        running = np.arange(1, len(order) + 1)
        tokens = self._lengths[order].cumsum() + running * self._remaining[order]
        within = self._count_window_columns(self._lengths + self._remaining)[order].cumsum()
        self._lengths, self._remaining = self._lengths[:-1], self._remaining[:-1]
        self._admitted = []
        return float(self._estimate_pages(tokens, running, within).max())

    def _count_window_columns(self, tokens: Any) -> Any:
        """Pages that a sequence of so many tokens has at most of a group with a window."""
        return np.minimum(-(-tokens // PAGE_SIZE), self._groups.window_columns)

    def _estimate_pages(self, tokens: Any, sequences: Any, windows: Any) -> Any:
        """Pages that `tokens` tokens of `sequences` sequences take, with `windows` pages of each group with a window.

        The last page of a sequence is filled by anything between nothing and all: half on average, with a standard
        deviation of 1/sqrt(12) pages, of which two are allowed for.
        """
        whole = tokens / PAGE_SIZE + 0.5 * sequences + 2 * (sequences / 12) ** 0.5
        return self._groups.full * whole + self._groups.windowed * windows
