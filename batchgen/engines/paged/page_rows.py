"""Where the keys and values of a step lie in a layer's cache, worked out once for all layers, for attention in torch.

Keys [pages, key heads, PAGE_SIZE, size] are taken as a matrix with a row for each token of each head, and values, too.
Such rows are copied whole and come out in order, while `keys[pages]` copies number by number, and its copy has to be
transposed afterwards.
"""

from __future__ import annotations

import torch

from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.rounding import Rounded, round_numbers, widen_numbers


class WriteRows:
    """The rows that the keys and values of a step's own tokens are written to.

    Args:
        pages: the page of each token, [tokens].
        offsets: its place in that page, [tokens].
    """

    def __init__(self, pages: torch.Tensor, offsets: torch.Tensor) -> None:
        self._pages, self._offsets = pages, offsets
        self._rows: dict[int, torch.Tensor] = {}  # [heads * tokens], by heads, since layers may differ in them

    def write(self, cache: torch.Tensor | Rounded, values: torch.Tensor) -> None:
        """Puts `values` [heads, tokens, size] into the keys or the values of a layer's cache."""
        if isinstance(cache, Rounded):
            numbers, exponents = round_numbers(values)
            self.write(cache.numbers.view(torch.uint8), numbers.view(torch.uint8))  # torch copies no rows of 8 bits
            self.write(cache.exponents[..., None], exponents[..., None])
            return
        heads, _, size = values.shape
        if heads not in self._rows:
            self._rows[heads] = _find_rows(self._pages[None], self._offsets[None], heads).flatten()
        cache.view(-1, size).index_copy_(0, self._rows[heads], values.reshape(-1, size).to(cache.dtype))


class ReadRows:
    """The rows that sequences read which take one token each; that token is read, too.

    Args:
        block_table: the pages of each sequence, [sequences, columns].
        positions: of their tokens, [sequences]; below 0: padding, which reads the first position.
    """

    def __init__(self, block_table: torch.Tensor, positions: torch.Tensor) -> None:
        self._positions = positions.clamp(min=0)[:, None]  # [sequences, 1]
        self._length = int(self._positions.max()) + 1
        self._block_table = block_table[:, : -(-self._length // PAGE_SIZE)].long()
        self._key_positions = torch.arange(self._length, device=block_table.device)
        self._rows: dict[tuple[int, int], torch.Tensor] = {}  # by window and heads
        self._biases: dict[object, torch.Tensor] = {}

    def read(self, cache: torch.Tensor | Rounded, window: int, dtype: torch.dtype) -> torch.Tensor:
        """Reads the keys or the values of a layer's cache: [sequences, heads, length, size], of type `dtype`.

        In the place of a token that a sequence does not see stands its last one: behind the end of a short sequence lie
        pages of other sequences, and what they hold, be it NaN, must not reach it.
        """
        if isinstance(cache, Rounded):
            numbers = self._read_rows(cache.numbers, window)
            exponents = self._read_rows(cache.exponents[..., None], window)
            return widen_numbers(Rounded(numbers, exponents[..., 0]), dtype)
        return self._read_rows(cache, window)

    def _read_rows(self, cache: torch.Tensor, window: int) -> torch.Tensor:
        _, heads, _, size = cache.shape
        if (window, heads) not in self._rows:
            read = torch.where(self._is_seen(window), self._key_positions, self._positions)
            pages = self._block_table.gather(1, read // PAGE_SIZE)
            self._rows[window, heads] = _find_rows(pages, read % PAGE_SIZE, heads)
        rows = self._rows[window, heads]
        return cache.view(-1, size).index_select(0, rows.flatten()).view(*rows.shape, size)

    def get_bias(self, window: int, slopes: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores, [sequences, heads or 1, 1, length]: -inf for what is not seen, and ALiBi's."""
        key = (window, dtype, None if slopes is None else slopes.data_ptr())
        if key not in self._biases:
            self._biases[key] = self._make_bias(window, slopes, dtype)
        return self._biases[key]

    def _make_bias(self, window: int, slopes: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        hidden = ~self._is_seen(window)[:, None, None]
        if slopes is None:
            return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)
        # Relative to the token itself: softmax does not see the difference, and the numbers stay small.
        bias = slopes[:, None, None] * (self._key_positions - self._positions)[:, None, None]
        return bias.masked_fill(hidden, -torch.inf).to(dtype)

    def _is_seen(self, window: int) -> torch.Tensor:
        """[sequences, length]: whether the token of a sequence sees the key at that position."""
        seen = self._key_positions <= self._positions
        return seen & (self._key_positions > self._positions - window) if window else seen


def _find_rows(pages: torch.Tensor, offsets: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows that tokens [sequences, tokens] have in a cache taken as a matrix: [sequences, heads, tokens]."""
    head = torch.arange(heads, device=pages.device)[:, None]
    return (pages.long()[:, None] * heads + head) * PAGE_SIZE + offsets.long()[:, None]
