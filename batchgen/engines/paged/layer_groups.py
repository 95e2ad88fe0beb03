"""Which layers share pages: those without a window, and those whose window lets go of what has passed. Pure.

A page of the cache holds the keys and values of `PAGE_SIZE` tokens for the layers of one group. All groups have equally
many layers, so that their pages are of one size and any group can take any of them: nothing is split in advance. The
layers without a window are in groups of their own, and so are those with one, whose pages are given back once no later
token sees them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.models.footprint import LayerCacheShape

_MOST_GROUPS = 16  # each of which has a block table, and as much planning as another one
_Positions = TypeVar("_Positions", int, NDArray[np.int32])


class LayerPlace(NamedTuple):
    """Where a layer keeps its keys and values."""

    group: int  # whose pages these are
    cache: int  # in which of the tensors that all groups share


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """The groups of a model's layers; those without a window come first."""

    full: int = 1  # groups whose pages are kept until their sequence ends
    windowed: int = 0  # groups whose pages are given back when the window has passed them
    window: int = 0  # tokens that each token looks back at in these, itself included
    caches: int = 0  # layers of a group; the last group of either kind may have fewer
    places: tuple[LayerPlace, ...] = ()  # of each layer

    @property
    def count(self) -> int:
        """How many groups there are."""
        return self.full + self.windowed

    @property
    def window_columns(self) -> int:
        """Most pages that a decoding sequence has in a group with a window: one that begins anywhere in a page touches
        one more than it fills."""
        return -(-(self.window - 1) // PAGE_SIZE) + 1 if self.windowed else 0

    def count_passed(self, position: _Positions) -> _Positions:
        """Returns how many of the first pages hold nothing that a token at `position`, or behind, sees in a window.

        Args:
            position: one, or an array of any shape.
        """
        if isinstance(position, int):
            return max(0, (position - self.window + 1) // PAGE_SIZE)
        passed: NDArray[np.int32] = np.maximum(0, (position - self.window + 1) // PAGE_SIZE)
        return passed

    def has_window(self, group: int) -> bool:
        """Whether the pages of this group are given back when the window has passed them."""
        return group >= self.full

    def find_most_columns(self, pages: int) -> int:
        """Returns how many pages a group can have of one sequence that has a cache of `pages` pages for itself."""
        most = pages // self.count
        if most < self.window_columns or not self.windowed:
            return most
        rest = pages - self.windowed * self.window_columns
        return rest // self.full if self.full else sys.maxsize  # with windows alone there is no limit

    def count_cached_tokens(self, tokens: NDArray[Any]) -> NDArray[Any]:
        """Returns how many of a sequence's tokens the pages of each group have room for once it has so many: the sum
        over the groups. Those of windows are counted in whole pages."""
        within = np.minimum(-(-tokens // PAGE_SIZE), self.window_columns) * PAGE_SIZE
        counted: NDArray[Any] = self.full * tokens + self.windowed * within
        return counted

    def shorten_chunk(self, tokens: int) -> int:
        """Returns how many tokens there must be room for before a prefill chunk of `tokens` is begun.

        While a chunk is computed, the groups with a window have pages for all of it. One that is as long as the window
        loses little by being the first of several.
        """
        return min(tokens, self.window) if self.windowed else tokens

    @classmethod
    def of(cls, layers: Sequence[LayerCacheShape], windows: Sequence[int], longest: int) -> LayerGroups:
        """Puts the layers of a model into groups.

        There are several only if pages can be of one size, and the window lets go of something; a single group has all
        layers.

        Args:
            layers: what each of them keeps.
            windows: that each of them has, in tokens; 0: none.
            longest: most tokens of a sequence.
        """
        window = max(windows, default=0)
        sizes = {(layer.heads, layer.key_size, layer.value_size) for layer in layers}
        alone = cls(caches=len(layers), places=tuple(LayerPlace(0, layer) for layer in range(len(layers))))
        if len(sizes) != 1 or set(windows) - {0, window} or not 0 < window < longest:
            return alone
        full = [layer for layer, own in enumerate(windows) if not own]
        windowed = [layer for layer, own in enumerate(windows) if own]
        size = min(len(full), len(windowed)) or len(layers)
        places, groups = [LayerPlace(0, 0)] * len(layers), [0]
        for kind in (full, windowed):
            for number, layer in enumerate(kind):
                places[layer] = LayerPlace(groups[-1] + number // size, number % size)
            groups.append(groups[-1] + -(-len(kind) // size))
        if groups[-1] > _MOST_GROUPS:
            return alone
        return cls(groups[1], groups[2] - groups[1], window, size, tuple(places))


ONE_GROUP = LayerGroups()
"""All layers share their pages."""
