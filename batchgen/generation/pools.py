"""Rows with a number for each token of the vocabulary, on the device, for the few rows of a batch that need one.

One for every place of a large batch would take gigabytes. Row 0 of a pool belongs to all who have none of their own: it
is zero, and stays so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from batchgen.generation.edits import IN_PROMPT, MOST_SEEN, ONE_MORE
from batchgen.generation.sampling import send

_FEWEST_ROWS = 8


class Pool:
    """Rows of `vocabulary` numbers that are taken and given back."""

    def __init__(self, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        self._vocabulary, self._dtype, self._device = vocabulary, dtype, device
        self.rows: torch.Tensor | None = None
        """[rows, vocabulary]; None: nobody has taken a row yet."""
        self._free: list[int] = []

    def take(self) -> int:
        """Returns the number of a row that nobody has, from 1; all of it is zero."""
        if not self._free:
            used = 0 if self.rows is None else len(self.rows)
            shape = (max(_FEWEST_ROWS, used), self._vocabulary)
            zeros = torch.zeros(shape, dtype=self._dtype, device=self._device)
            self.rows = zeros if self.rows is None else torch.cat([self.rows, zeros])
            self._free = list(range(len(self.rows) - 1, max(used, 1) - 1, -1))
        return self._free.pop()

    def give_back(self, row: int) -> None:
        """Takes back a row; 0 is nobody's."""
        if row and self.rows is not None:
            self.rows[row].zero_()
            self._free.append(row)

    def put(self, row: int, ids: Sequence[int], values: Sequence[float]) -> None:
        """Writes the numbers of some tokens, each of them once; ids outside the vocabulary are left out."""
        assert self.rows is not None
        inside = [(token, value) for token, value in zip(ids, values, strict=True) if token < self._vocabulary]
        columns = send(torch.tensor([token for token, _ in inside], dtype=torch.long), self._device)
        self.rows[row, columns] = send(torch.tensor([value for _, value in inside], dtype=self._dtype), self._device)


class SeenPool(Pool):
    """The tokens of the prompt and of the text of rows with penalties, as `EditTensors.seen` has them."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        super().__init__(vocabulary, torch.int16, device)

    def begin(self, prompt: Sequence[int], generated: Sequence[int]) -> int:
        """Returns the row of a prompt that has generated these tokens so far."""
        seen = Counter(dict.fromkeys(prompt, IN_PROMPT))
        for token in generated:
            seen[token] += ONE_MORE
        row = self.take()
        self.put(row, list(seen), [min(count, MOST_SEEN) for count in seen.values()])
        return row


Bias = tuple[tuple[tuple[int, float], ...], tuple[int, ...], tuple[int, ...]]
"""What is added to logits, the only tokens that are allowed (none: all are), and tokens that are not allowed."""


class BiasPool(Pool):
    """What is added to the logits of rows; rows that ask for the same share one."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        super().__init__(vocabulary, torch.float32, device)
        self._users: dict[Bias, list[int]] = {}  # its row, and how many have it
        self._owners: dict[int, Bias] = {}

    def begin(self, bias: Bias) -> int:
        """Returns the row with this bias; 0 if it changes nothing."""
        if not any(bias):
            return 0
        if bias not in self._users:
            added, allowed, forbidden = bias
            row = self.take()
            assert self.rows is not None
            if allowed:
                self.rows[row].fill_(-torch.inf)
                self.put(row, allowed, [0.0] * len(allowed))
            sums = dict(added)
            if allowed:  # a bias brings no token back
                sums = {token: value for token, value in sums.items() if token in set(allowed)}
            sums |= dict.fromkeys(forbidden, -torch.inf)
            self.put(row, list(sums), list(sums.values()))
            self._users[bias], self._owners[row] = [row, 0], bias
        self._users[bias][1] += 1
        return self._users[bias][0]

    def end(self, row: int) -> None:
        """Tells that one row less has this bias."""
        if not row:
            return
        users = self._users[self._owners[row]]
        users[1] -= 1
        if not users[1]:
            del self._users[self._owners.pop(row)]
            self.give_back(row)
