"""Where the tokens of a step belong: what attention has to know besides queries, keys and values.

The tokens of all sequences of a step lie in one row, and a model computes them as if they were one sequence. Which
sequence each belongs to, and which pages that sequence has, does not travel through the model: the runner lays a
`Layout` out around the forward (`lay_out`), and the attention operator asks for it when it runs (`get_current_layout`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from batchgen.engines.paged.layer_groups import ONE_GROUP, LayerGroups
from batchgen.engines.paged.page_rows import ReadRows, WriteRows
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.rounding import Rounded
from batchgen.engines.paged.step import Chunk

QUERY_BLOCK = 64
"""Tokens of a prefill chunk that one program of a kernel computes, at most."""


class AttentionShape(NamedTuple):
    """What tells the attention of one kind of layer from that of another."""

    scale: float  # of the scores
    window: int = 0  # tokens that each token looks back at, itself included; 0: all of them
    slopes: torch.Tensor | None = None  # of ALiBi, [heads], float32; None: there is no bias
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap), before biases and the mask; 0: they do not
    sinks: torch.Tensor | None = None  # [heads], one more score a head, after scale and cap, that has no value


CacheHalf = torch.Tensor | Rounded
"""The keys of one layer, or the values: [pages, key heads, PAGE_SIZE, size]."""


class LayerCache(NamedTuple):
    """The keys and values of one layer. Layers may differ in both sizes and in their number of key heads."""

    keys: torch.Tensor  # [pages, key heads, PAGE_SIZE, key size]
    values: torch.Tensor  # [pages, key heads, PAGE_SIZE, value size]
    # Of each key and value, if these are `rounding.NUMBERS`: [pages, key heads, PAGE_SIZE], as `Rounded.exponents`.
    key_exponents: torch.Tensor | None = None
    value_exponents: torch.Tensor | None = None

    @property
    def is_rounded(self) -> bool:
        """Whether the numbers are of 8 bits."""
        return self.key_exponents is not None

    @property
    def halves(self) -> tuple[CacheHalf, CacheHalf]:
        """The keys, and the values."""
        if self.key_exponents is None or self.value_exponents is None:
            return self.keys, self.values
        return Rounded(self.keys, self.key_exponents), Rounded(self.values, self.value_exponents)


class AdapterRows(NamedTuple):
    """Which adapter the tokens of a step have; see `adapters.sort_by_adapter`. Numbers count from 0 here."""

    numbers: torch.Tensor  # [tokens, 1], int32: the adapter of each token; as many as there are adapters: none
    order: torch.Tensor  # [tokens], int32: the token at each place, sorted by adapter
    offsets: torch.Tensor  # [adapters + 1], int32: the first place of each adapter, and the end of the last one's
    places: torch.Tensor  # [tokens, 1], int32: the place of each token
    weights: torch.Tensor  # [tokens, 1], float32: ones


@dataclass(frozen=True)
class Layout:
    """Where the tokens of the current step belong."""

    caches: Sequence[LayerCache]  # of each layer
    # [slots + 1, columns + 2], int32: the pages of the sequence in each slot, the number of its adapter, from 1 (0:
    # none), and how many tokens its prompt has. Where layers are in several groups, this is the table of one of them,
    # the first of which has these two numbers.
    block_table: torch.Tensor
    slots: torch.Tensor  # [tokens], int32: the slot of each token's sequence
    positions: torch.Tensor  # [tokens], int32: the position in its sequence; below 0: padding
    decoding: int  # how many of the first tokens decode, one for each sequence; for the kernels, as many or more
    chunks: Sequence[Chunk] = ()  # all other tokens
    # The kernels alone use these. A CUDA graph has fixed sizes, so what differs between its replays is on the device.
    decoding_count: torch.Tensor | None = None  # [1], int32: how many tokens decode
    query_blocks: torch.Tensor | None = None  # [blocks, 2], int32: first token and number of tokens; 0: an empty block
    splits: int = 1  # programs that share a decoding sequence
    groups: LayerGroups = ONE_GROUP  # of the layers
    block_tables: torch.Tensor | None = None  # [groups, slots + 1, columns + 2]; None: there is a single group
    adapters: AdapterRows | None = None  # None: no token has one

    def of_layer(self, layer: int) -> Layout:
        """The same layout, with the block table of this layer's group."""
        return self if self.block_tables is None else self._of_groups[self.groups.places[layer].group]

    @cached_property
    def _of_groups(self) -> list[Layout]:
        assert self.block_tables is not None
        return [replace(self, block_table=table) for table in self.block_tables]

    @property
    def prompt_tokens(self) -> torch.Tensor:
        """How many tokens the prompt of each token's sequence has, [tokens], int32."""
        return self.block_table[:, -1].index_select(0, self.slots)

    @property
    def adapter_numbers(self) -> torch.Tensor:
        """The number of the adapter of each token, from 1; 0: none. [tokens], int32."""
        return self.block_table[:, -2].index_select(0, self.slots)

    # Attention in torch alone uses these, which are the same for all layers.
    @cached_property
    def has_no_padding(self) -> bool:
        """Whether every token belongs to a sequence."""
        return bool((self.positions >= 0).all())

    @cached_property
    def write_rows(self) -> WriteRows:
        """Where the keys and values of all tokens go that are not padding."""
        real = self.positions >= 0
        positions = self.positions[real].long()
        pages = self.block_table[self.slots[real].long(), positions // PAGE_SIZE]
        return WriteRows(pages, positions % PAGE_SIZE)

    @cached_property
    def read_rows(self) -> ReadRows:
        """Where the tokens that decode read keys and values."""
        slots = self.slots[: self.decoding].long()
        return ReadRows(self.block_table[slots], self.positions[: self.decoding].long())


class _Current(threading.local):
    layout: Layout | None = None
    windows: dict[int, int] | None = None
    adapter: int = 0
    rounds: bool = False
    adapted: set[int] | None = None


_current = _Current()


@contextmanager
def _hold(name: str, value: object) -> Iterator[None]:
    """What this thread runs inside finds `value` there; afterwards it is what it was."""
    before = getattr(_current, name)
    setattr(_current, name, value)
    try:
        yield
    finally:
        setattr(_current, name, before)


def get_current_layout() -> Layout | None:
    """The layout of the forward that this thread runs; None: the model runs by itself."""
    return _current.layout


def record_windows(windows: dict[int, int]) -> AbstractContextManager[None]:
    """The forwards that this thread runs inside, without a layout, note down the window of each layer in `windows`."""
    return _hold("windows", windows)


def note_window(layer: int, window: int) -> None:
    """A forward without a layout has come to the attention of this layer, which has this window; 0: none."""
    if _current.windows is not None:
        # Attention that comes by again with another window sees as much as the widest one shows.
        known = _current.windows.get(layer, window)
        _current.windows[layer] = max(known, window) if known and window else 0


def use_adapter(number: int) -> AbstractContextManager[None]:
    """In the forwards that this thread runs inside, without a layout, all tokens have this adapter; 0: none."""
    return _hold("adapter", number)


def get_current_adapter() -> int:
    """The number of the adapter of all tokens of a forward without a layout, from 1; 0: none."""
    return _current.adapter


def round_as_cache(kv_dtype: str) -> AbstractContextManager[None]:
    """In the forwards that this thread runs inside, without a layout, keys and values are those that a cache of this
    type would have kept."""
    return _hold("rounds", kv_dtype != "auto")


def are_rounded_as_cache() -> bool:
    """Whether the keys and values of a forward without a layout are to be those of a cache of 8 bits."""
    return _current.rounds


def record_adapted(addresses: set[int]) -> AbstractContextManager[None]:
    """The forwards that this thread runs inside note down where B lies of each adapted layer that they run."""
    return _hold("adapted", addresses)


def note_adapted(address: int) -> None:
    """A forward has come to the layer with adapters whose B lies there."""
    if _current.adapted is not None:
        _current.adapted.add(address)


def lay_out(layout: Layout) -> AbstractContextManager[None]:
    """The forwards that this thread runs inside have their tokens laid out like this."""
    return _hold("layout", layout)


def make_query_blocks(chunks: Sequence[Chunk]) -> torch.Tensor:
    """The chunks as the kernels take them: [blocks, 2], int32, the first token and the number of tokens of each block.

    Those with the most tokens to look back at come first, so that the last programs to run are short ones.
    """
    ordered = sorted(chunks, key=lambda chunk: -chunk.length)
    blocks = [
        (chunk.first + begin, min(QUERY_BLOCK, chunk.count - begin))
        for chunk in ordered
        for begin in range(0, chunk.count, QUERY_BLOCK)
    ]
    return torch.tensor(blocks, dtype=torch.int32)
