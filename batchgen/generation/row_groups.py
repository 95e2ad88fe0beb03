"""The rows of a step, grouped by what has to be done for their next tokens, with their parameters on the device.

They are reused until the rows or their needs change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from batchgen.generation.edits import EditTensors
from batchgen.generation.pools import BiasPool, SeenPool
from batchgen.generation.row_state import RowState
from batchgen.generation.sampling import SamplingTensors, send

# Rows x vocabulary edited at once: 32 MiB for each float32 tensor, 512 MiB on a GPU.
_ELEMENTS_AT_ONCE, _ELEMENTS_AT_ONCE_ON_GPU = 2**23, 2**27


@dataclass(frozen=True, slots=True)
class EditedPart:
    """Rows that are edited together. Tensors are int64, on the device."""

    numbers: Sequence[int]  # of the rows, among all of the step; those with a mask come first
    rows: torch.Tensor  # the same, [rows]
    masked_count: int  # how many have a mask
    edits: EditTensors
    sampled: torch.Tensor  # which of these rows are sampled, among these: [sampled rows]
    sampled_rows: torch.Tensor  # the same, among all of the step: [sampled rows]
    sampling: SamplingTensors | None  # of the sampled ones; None: all are greedy


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """Rows that ask for log-probabilities."""

    numbers: Sequence[int]  # among all of the step
    rows: torch.Tensor  # the same, int64 [rows], on the device
    is_masked: bool  # they have masks


class RowGroups:
    """The groups of some rows.

    Attributes:
        is_sampled: any row is sampled.
        plain: the rows that are sampled and not edited, int64 [rows], and their parameters; None: there are none.
        edited: the rows that are edited, in parts that are small enough.
        seen: the rows with penalties, int64 [rows], and their rows of the pool, the same shape; None: there are none.
        asking: the rows that ask for log-probabilities: those without a mask, and those with one.
        most_logprobs: how many of the likeliest tokens the most demanding one of them asks for.
    """

    def __init__(
        self, rows: Sequence[RowState], vocabulary: int, pools: tuple[SeenPool, BiasPool], device: torch.device
    ) -> None:
        self._rows, self._device, self._pools = list(rows), device, pools
        self._flags = [(row.is_edited, row.is_masked) for row in rows]
        plain = [n for n, row in enumerate(rows) if row.params.temperature > 0 and not self._flags[n][0]]
        edited = [n for n, (is_edited, _) in enumerate(self._flags) if is_edited]
        edited.sort(key=lambda n: not self._flags[n][1])
        seen = [n for n, row in enumerate(rows) if row.seen_row]
        asking = [n for n, row in enumerate(rows) if row.params.logprobs]
        elements = _ELEMENTS_AT_ONCE_ON_GPU if device.type == "cuda" else _ELEMENTS_AT_ONCE
        size = max(1, elements // vocabulary)
        self.is_sampled = any(row.params.temperature > 0 for row in rows)
        self.plain = (self._send(plain), self._sampling(plain)) if plain else None
        self.edited = [self._make_part(edited[begin : begin + size]) for begin in range(0, len(edited), size)]
        self.seen = (self._send(seen), self._send([rows[n].seen_row for n in seen])) if seen else None
        self.most_logprobs = max((rows[n].params.top_logprobs for n in asking), default=0)
        by_mask = {masked: [n for n in asking if self._flags[n][1] is masked] for masked in (False, True)}
        self.asking = [LogprobRows(some, self._send(some), masked) for masked, some in by_mask.items() if some]

    def matches(self, rows: Sequence[RowState]) -> bool:
        """Returns whether these are the groups of `rows`."""
        return self._rows == list(rows) and self._flags == [(row.is_edited, row.is_masked) for row in rows]

    def _make_part(self, numbers: Sequence[int]) -> EditedPart:
        seen, biases = self._pools
        rows = [self._rows[n] for n in numbers]
        sampled = [place for place, row in enumerate(rows) if row.params.temperature > 0]
        return EditedPart(
            numbers,
            self._send(numbers),
            sum(row.is_masked for row in rows),
            EditTensors.of(
                [row.params for row in rows],
                (seen.rows if any(row.seen_row for row in rows) else None, [row.seen_row for row in rows]),
                (biases.rows if any(row.bias_row for row in rows) else None, [row.bias_row for row in rows]),
                self._device,
            ),
            self._send(sampled),
            self._send([numbers[place] for place in sampled]),
            self._sampling([numbers[place] for place in sampled]) if sampled else None,
        )

    def _sampling(self, numbers: Sequence[int]) -> SamplingTensors:
        return SamplingTensors.of([self._rows[n].params for n in numbers], self._device)

    def _send(self, numbers: Sequence[int]) -> torch.Tensor:
        return send(torch.tensor(numbers, dtype=torch.long), self._device)
