"""Where the keys and values of a step lie in a layer's cache, worked out once for all layers, for attention in torch.

A cache [pages, heads, SIZE, head size] is taken as a matrix with a row for each token of each head. Such rows are
copied whole and come out in order, while `cache[pages]` copies number by number, and its copy has to be turned after.
"""

from __future__ import annotations

import torch

from batchgen.engines.paged.pages import SIZE


class Written:
    """Where the keys and values of a step's own tokens go.

    Args:
        pages: of each token, [tokens].
        offsets: in its page, [tokens].
        heads: of the cache.
    """

    def __init__(self, pages: torch.Tensor, offsets: torch.Tensor, heads: int) -> None:
        self._rows = _rows(pages[None], offsets[None], heads).flatten()  # [heads * tokens]

    def write(self, cache: torch.Tensor, values: torch.Tensor) -> None:
        """Puts `values` [heads, tokens, head size] into one half of a layer's cache."""
        size = values.shape[-1]
        cache.view(-1, size).index_copy_(0, self._rows, values.reshape(-1, size).to(cache.dtype))


class Decoding:
    """What sequences that take one token each read, that token included.

    Args:
        table: of their pages, [sequences, columns].
        places: of their tokens, [sequences]; below 0: padding, which reads the first place.
        heads: of the cache.
    """

    def __init__(self, table: torch.Tensor, places: torch.Tensor, heads: int) -> None:
        self._places = places.clamp(min=0)[:, None]  # [sequences, 1]
        self._length = int(self._places.max()) + 1
        self._table = table[:, : -(-self._length // SIZE)].long()
        self._others = torch.arange(self._length, device=table.device)
        self._heads = heads
        self._kept: dict[int, torch.Tensor] = {}
        self._biases: dict[object, torch.Tensor] = {}

    def read(self, cache: torch.Tensor, window: int) -> torch.Tensor:
        """Of one half of a layer's cache, [sequences, heads, length, head size].

        In the place of a token that a sequence does not see stands its last one: behind the end of a short sequence lie
        pages of others, and what they hold, be it NaN, must not reach it.
        """
        if window not in self._kept:
            read = torch.where(self._seen(window), self._others, self._places)
            self._kept[window] = _rows(self._table.gather(1, read // SIZE), read % SIZE, self._heads)
        kept, size = self._kept[window], cache.shape[-1]
        return cache.view(-1, size).index_select(0, kept.flatten()).view(*kept.shape, size)

    def bias(self, window: int, slopes: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores, [sequences, heads or 1, 1, length]: -inf for what is not seen, and ALiBi's."""
        key = (window, dtype, None if slopes is None else slopes.data_ptr())
        if key not in self._biases:
            self._biases[key] = self._make_bias(window, slopes, dtype)
        return self._biases[key]

    def _make_bias(self, window: int, slopes: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        hidden = ~self._seen(window)[:, None, None]
        if slopes is None:
            return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)
        # Relative to the token itself: softmax does not see the difference, and the numbers stay small.
        bias = slopes[:, None, None] * (self._others - self._places)[:, None, None]
        return bias.masked_fill(hidden, -torch.inf).to(dtype)

    def _seen(self, window: int) -> torch.Tensor:
        """[sequences, length]."""
        seen = self._others <= self._places
        return seen & (self._others > self._places - window) if window else seen


def _rows(pages: torch.Tensor, offsets: torch.Tensor, heads: int) -> torch.Tensor:
    """Of a cache as a matrix, for tokens [sequences, tokens] and every head: [sequences, heads, tokens]."""
    head = torch.arange(heads, device=pages.device)[:, None]
    return (pages.long()[:, None] * heads + head) * SIZE + offsets.long()[:, None]
