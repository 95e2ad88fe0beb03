"""How many rows a batch may have: an estimate before it, and what an out-of-memory error has taught."""

from __future__ import annotations

import math

import torch

_MOST_ROWS = 512
_MOST_ROWS_ON_CPU = 32  # beyond this a CPU gains nothing, and one batch would take minutes to commit
_SHARE = 0.8  # of free memory; the rest is for fragmentation and what the estimate leaves out
_BUCKET = 1.25  # lengths within this factor share a limit


class SizeLimits:
    """The most rows a batch may have, by its length in tokens (prompt and new ones), learnt from running out."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}  # lower edge of a bucket of lengths → rows

    def remember(self, length: int, rows: int) -> None:
        """From `length` tokens up, a batch has no more than `rows` rows; 0: not even one fits."""
        edge = math.floor(_BUCKET ** math.floor(math.log(max(length, 1), _BUCKET)))
        self._rows[edge] = min(rows, self._rows.get(edge, rows))

    def max_rows(self, length: int) -> int | None:
        """Returns the most rows of a batch of `length` tokens; None: nothing was learnt about such a batch.

        A shorter batch may have more rows in proportion: the cache and the activations grow with rows x length.
        """
        limits = ((edge, rows) for edge, rows in self._rows.items() if rows or length >= edge)
        return min((max(rows, rows * edge // max(length, 1)) for edge, rows in limits), default=None)


def count_rows_that_fit(free: int, row: int, device: torch.device, max_rows: int | None = None) -> int:
    """Returns how many rows of `row` bytes fit into `free` bytes with room to spare.

    It is from 1 to `max_rows`, in eights from 8 up. `max_rows` is 512 unless given, and never more than 32 on a CPU.
    """
    max_rows = _MOST_ROWS if max_rows is None else max_rows
    if device.type == "cpu":
        max_rows = min(max_rows, _MOST_ROWS_ON_CPU)
    rows = max(1, min(max_rows, int(free * _SHARE) // max(row, 1)))
    return rows - rows % 8 if rows >= 8 else rows
