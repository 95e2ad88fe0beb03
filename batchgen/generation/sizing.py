"""How many rows the next batch may have: what the engine says about its devices, and what follows from that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from batchgen.device import can_reserve, free_bytes
from batchgen.engine import Peers
from batchgen.generation.greedy import LoadedModel
from batchgen.generation.limits import SizeLimits, count_rows_that_fit
from batchgen.models import architectures
from batchgen.models.footprint import Execution, Footprint
from batchgen.types import Prompt


@dataclass(frozen=True, slots=True)
class BatchSizing:
    """What an engine says about the size of its batches."""

    batch_size: int | None  # the most rows of a batch; None: as many as an estimate says will fit
    devices: Sequence[torch.device] = ()  # all devices that hold the model; memory is measured there; (): where ids go
    local_size: int = 1  # ranks that share the memory of this host
    limits: Mapping[int, int] = field(default_factory=dict)  # the most rows by length, which earlier attempts learnt
    kept_free: int = 0  # bytes of each device that a forward needs besides
    most_rows: int | None = None  # of a batch whose size is estimated; None: as `limits.count_rows_that_fit` has it
    # Take the memory that a batch is estimated to need, and give it back, before the model sees the batch: for models
    # whose forward may not fail.
    reserve: bool = False


class BatchSizer:
    """Decides how many rows a batch may have, and which rows can be in one batch.

    Args:
        loaded: the model that generates the batches.
        peers: the ranks that generate these batches together with this one; None: this rank is alone.
    """

    def __init__(self, loaded: LoadedModel, sizing: BatchSizing, peers: Peers | None) -> None:
        self._device = loaded.device
        self._sizing, self._peers = sizing, peers
        self._most_padded = architectures.most_padded_tokens(loaded.tokenizer.config)
        self._footprint = Footprint.of(loaded.tokenizer.config)
        self._execution = Execution(
            loaded.model.dtype.itemsize,
            ranks=1 if peers is None else peers.count,
            eager=not getattr(loaded.model, "_supports_sdpa", False),
            copies_experts=loaded.device.type != "cpu",
        )
        self.devices = sizing.devices or [loaded.device]
        self.limits = SizeLimits()
        for length, rows in sizing.limits.items():
            self.limits.remember(length, rows)

    def measure_free(self) -> int:
        """Returns the free bytes of all devices together, the smallest of all ranks; 0 where nothing depends on it."""
        if self._sizing.batch_size is not None:
            return 0
        free = free_bytes(self.devices, self._sizing.local_size) - len(self.devices) * self._sizing.kept_free
        return free if self._peers is None else self._peers.least(free)

    def max_rows(self, prompt_tokens: int, new_tokens: int, free: int) -> int:
        """Returns the most rows of a batch in which each row has at most this many tokens.

        Args:
            free: the bytes that `measure_free` has returned.
        """
        rows = self._sizing.batch_size
        if rows is None:
            size = self._row_bytes(prompt_tokens, new_tokens)
            rows = count_rows_that_fit(free, size, self._device, self._sizing.most_rows)
        learnt = self.limits.max_rows(prompt_tokens + new_tokens)
        return rows if learnt is None else min(rows, learnt)

    def can_join(self, batch: Sequence[Prompt], prompt: Prompt) -> bool:
        """Returns whether `prompt` can be in one batch with these."""
        if self._most_padded is None:
            return True
        together = [*batch, prompt]
        lengths = {len(prompt.tokens) for prompt in together}
        return len(lengths) == 1 or sum(find_longest(together)) <= self._most_padded

    def fits(self, batch: Sequence[Prompt]) -> bool:
        """Returns whether the memory for `batch` can be had on all ranks, where that has to be tried before a forward.

        All peers call it at the same time, with the same batch.
        """
        size = len(batch) * self._row_bytes(*find_longest(batch)) + self._sizing.kept_free
        fits = not self._sizing.reserve or can_reserve(size, self._device)
        return fits if self._peers is None else not self._peers.any_rank(not fits)

    def _row_bytes(self, prompt_tokens: int, new_tokens: int) -> int:
        return self._footprint.row_bytes(prompt_tokens, new_tokens, self._execution)


def find_longest(batch: Sequence[Prompt]) -> tuple[int, int]:
    """Returns the tokens of the longest prompt, and the most new tokens: what every row of `batch` can come to."""
    return max(len(p.tokens) for p in batch), max(p.params.max_new_tokens for p in batch)


def group_by_length(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Returns batches whose prompts have the same number of tokens each, so that nothing is padded."""
    batches: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        batches.setdefault(len(prompt.tokens), []).append(prompt)
    return list(batches.values())
