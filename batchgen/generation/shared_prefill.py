"""One prefill for all samples of a row that are in the same static batch.

`model.generate` computes the prompts of its rows in its first forward. Here that forward is given one row of each
prompt, and what it returns, the logits and the cache, is then made as large as the batch. So `generate` itself, the
logits processors and the number of forwards stay as they are, and each further step has all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from batchgen.models import architectures
from batchgen.types import Tokens

_TENSORS = ("input_ids", "attention_mask", "position_ids")  # arguments of a forward, each [rows, tokens]


class SharedPrefill:
    """The first forward of a batch, which computes equal prompts once.

    Args:
        prompts: the number of the input row, and the tokens, of each row of the batch. Rows of other numbers share
            nothing, so that a benchmark that repeats its prompts measures what rows of different prompts take.
    """

    def __init__(self, prompts: Sequence[tuple[int, Tokens]]) -> None:
        places: dict[tuple[int, Tokens], int] = {}
        rows = [places.setdefault((number, tuple(tokens)), len(places)) for number, tokens in prompts]
        first = {place: row for row, place in reversed([*enumerate(rows)])}
        self._first = [first[place] for place in range(len(places))]  # the row in which each prompt is computed
        self._rows = torch.LongTensor(rows)  # for each row the place of its prompt among these
        self._is_awaited = len(places) < len(rows)
        self._cache: DynamicCache | None = None  # of a forward that has been made smaller
        self.spared_rows: Sequence[int] = ()
        """Rows whose prompt was computed in another row."""

    @contextmanager
    def of(self, model: Any) -> Iterator[SharedPrefill]:
        """Makes the next forward of `model`, which is to be the prefill of the batch, compute equal prompts once.

        The forward is left as it is where all prompts differ, where it has other arguments than text, or where the
        model's state cannot be selected by row.

        Args:
            model: a causal language model of Transformers, in whose `generate` the forward happens.
        """
        handles = []
        if self._is_awaited and architectures.holds_state_in_cache(model.config):
            handles.append(model.register_forward_pre_hook(self._narrow, with_kwargs=True))
            handles.append(model.register_forward_hook(self._widen))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _narrow(self, model: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Returns the arguments with one row of each prompt; None, which changes nothing, where that cannot be done."""
        if not self._is_awaited:
            return None
        self._is_awaited = False
        self._cache = None if positional else _find_cache(named, len(self._rows))
        if self._cache is None:
            return None
        self.spared_rows = sorted({*range(len(self._rows))}.difference(self._first))
        return (), {
            name: value[self._first] if isinstance(value, torch.Tensor) else value for name, value in named.items()
        }

    def _widen(self, model: Any, positional: tuple[Any, ...], output: Any) -> None:
        """Gives `output` the logits, and its cache the state, of each row of the batch."""
        if self._cache is None:
            return
        cache, self._cache = self._cache, None
        cache.reorder_cache(self._rows)
        # Of all places of a prompt `generate` looks at the last one alone.
        output.logits = output.logits[:, -1:].index_select(0, self._rows.to(output.logits.device))


def _find_cache(named: Mapping[str, Any], rows: int) -> DynamicCache | None:
    """Returns the cache of a forward with these arguments; None: they are not `rows` rows of text with such a cache."""
    cache = named.get("past_key_values", named.get("cache_params"))
    # Layers that a model defines for itself may hold more than `reorder_cache` selects.
    if type(cache) is not DynamicCache or any(type(one).__module__ != DynamicCache.__module__ for one in cache.layers):
        return None
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            if name not in _TENSORS or value.dim() != 2 or len(value) != rows:
                return None
        elif value and value is not cache and not isinstance(value, bool | int | float | str):
            return None
    return cache
