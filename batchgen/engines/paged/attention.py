"""Keys and values into pages, and attention over them: the function that takes the place of a model's own.

The tokens of all sequences of a step lie in one row. Where each belongs does not travel through the model: it is the
`Layout` that the runner has set, which the operator finds when it runs. To the compiler the operator is opaque.

Without a layout, attention is plain and causal over the given tokens alone: what a model is checked against.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from batchgen.engines.paged.pages import SIZE
from batchgen.engines.paged.places import Decoding, Written
from batchgen.engines.paged.step import Part


@dataclass(frozen=True)
class Layout:
    """Where the tokens of the current step belong."""

    caches: Sequence[torch.Tensor]  # of each layer, [2 (keys, values), pages, heads, SIZE, head size]
    table: torch.Tensor  # [slots + 1, columns], the pages of each sequence; int32
    slots: torch.Tensor  # [tokens], int32
    positions: torch.Tensor  # [tokens], int32; below 0: padding
    decoding: int  # the first tokens, one of each sequence; for the kernels, as many or more
    parts: Sequence[Part] = ()  # all others
    # For the kernels alone. A graph has fixed sizes, so what differs between its replays lies on the device.
    count: torch.Tensor | None = None  # [1], the tokens that decode; int32
    blocks: torch.Tensor | None = None  # [blocks, 2] of the parts: first token, tokens (0: none); int32
    splits: int = 1  # programs that share a decoding sequence

    # For torch alone: what is the same for all layers.
    @cached_property
    def all_real(self) -> bool:
        """None of the tokens is padding."""
        return bool((self.positions >= 0).all())

    @cached_property
    def written(self) -> Written:
        """Where the tokens that are not padding go."""
        real = self.positions >= 0
        positions = self.positions[real].long()
        pages = self.table[self.slots[real].long(), positions // SIZE]
        return Written(pages, positions % SIZE, self.caches[0].shape[2])

    @cached_property
    def read(self) -> Decoding:
        """What the tokens that decode read."""
        slots = self.slots[: self.decoding].long()
        return Decoding(self.table[slots], self.positions[: self.decoding].long(), self.caches[0].shape[2])


class _Current(threading.local):
    layout: Layout | None = None


_current = _Current()


@contextmanager
def over(layout: Layout) -> Iterator[None]:
    """Models that this thread runs inside have their tokens laid out so."""
    before, _current.layout = _current.layout, layout
    try:
        yield
    finally:
        _current.layout = before


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: torch.Tensor,
    scale: float,
    window: int,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of all tokens of the step, whose keys and values are kept.

    Args:
        query: [1, heads, tokens, head size].
        key, value: [1, key heads, tokens, head size]; each serves `heads / key heads` heads of the query in turn.
        layer: its number, [1], on the CPU.
        scale: of the scores.
        window: tokens that each looks back at, itself included; 0: all.
        slopes: of ALiBi, [heads] in float32; None: no bias.

    Returns:
        [1, tokens, heads, head size].
    """
    found: torch.Tensor = torch.ops.batchgen.paged_attention(query, key, value, layer, scale, window, slopes)
    return found


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: torch.Tensor,
    scale: float,
    window: int,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    layout = _current.layout
    if layout is None:
        return _plain(query, key, value, scale, window, slopes)
    cache = layout.caches[int(layer)]
    if query.device.type == "cuda":
        from batchgen.engines.paged import kernels  # Triton comes with a torch for GPUs alone

        return kernels.attend(query, key, value, cache, layout, scale, window, slopes)
    return reference(query, key, value, cache, layout, scale, window, slopes)


def _shape(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], query.shape[3]))


_library = torch.library.Library("batchgen", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor layer, float scale, int window, Tensor? slopes)"
    " -> Tensor"
)
_library.impl("paged_attention", _attend, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("batchgen::paged_attention", _shape, lib=_library)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    layout: Layout,
    scale: float,
    window: int,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    """As `attend`, in plain torch on any device."""
    real = slice(None) if layout.all_real else layout.positions >= 0
    for half, values in zip(cache, (key, value), strict=True):
        layout.written.write(half, values[0][:, real])
    out = torch.zeros_like(query.transpose(1, 2).contiguous())
    if layout.decoding:
        found = _decoded(query[0, :, : layout.decoding], cache, layout.read, scale, window, slopes)
        if not layout.all_real:
            found = found.masked_fill((layout.positions[: layout.decoding] < 0)[:, None, None], 0)
        out[0, : layout.decoding] = found
    plain = slopes is None and bool(layout.parts) and bool(key.isfinite().all() & value.isfinite().all())
    for part in layout.parts:
        those = slice(part.first, part.first + part.count)
        own = query[:, :, those]
        if plain and part.count == part.length and not 0 < window < part.length:  # all that it sees is in this step
            grouped = query.shape[1] != key.shape[1]
            found = F.scaled_dot_product_attention(
                own, key[:, :, those], value[:, :, those], is_causal=True, scale=scale, enable_gqa=grouped
            )
        else:
            kept = _read(cache, layout.table[part.slot : part.slot + 1], part.length)
            begin = torch.tensor([part.length - part.count], device=query.device)
            found = _masked(own, *kept, begin, scale, window, slopes)
        out[0, those] = found[0].transpose(0, 1)
    return out


def _decoded(
    query: torch.Tensor,
    cache: torch.Tensor,
    read: Decoding,
    scale: float,
    window: int,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one token a sequence, [heads, sequences, head size] to [sequences, heads, head size].

    The heads that share keys are as many tokens of one head, which see the same.
    """
    key, value = (read.read(half, window) for half in cache)
    shape = (key.shape[0], key.shape[1], -1, key.shape[-1])  # [sequences, key heads, heads of each, head size]
    bias = read.bias(window, slopes, query.dtype)
    if slopes is not None:
        bias = bias.view(*shape[:2], -1, key.shape[2])
    rows = query.transpose(0, 1).reshape(shape)
    return F.scaled_dot_product_attention(rows, key, value, bias, scale=scale).flatten(1, 2)


def _read(cache: torch.Tensor, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of sequences with rows `table`, [sequences, heads, length, head size] each."""
    pages = table[:, : -(-length // SIZE)].long()
    both = cache[:, pages].transpose(2, 3).flatten(3, 4)[..., :length, :]
    return both[0], both[1]


def _masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    begin: torch.Tensor,
    scale: float,
    window: int,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of [sequences, heads, tokens, head size], whose first tokens are at places `begin`.

    What a token does not see has no part in its result, be it NaN: behind the end of a short sequence lie pages of
    others, and 0 * NaN is NaN. A token that sees a key or value which is not finite gets NaN. Changes these two.
    """
    places = begin[:, None] + torch.arange(query.shape[2], device=query.device)  # [sequences, tokens]
    others = torch.arange(key.shape[2], device=query.device)
    seen = others <= places[..., None]  # [sequences, tokens, keys]
    if window:
        seen &= others > places[..., None] - window
    sequences, hidden = (~seen.any(1)).nonzero(as_tuple=True)
    for kept in (key, value):
        kept[sequences, :, hidden] = 0
    broken = _break_apart(key, value) if query.shape[2] > 1 else None
    mask = seen[:, None]
    if slopes is not None:
        # Relative to the token itself: softmax does not see the difference, and the numbers stay small.
        bias = slopes[:, None, None] * (others - places[:, None, :, None])
        mask = bias.masked_fill(~mask, -torch.inf).to(query.dtype)
    grouped = query.shape[1] != key.shape[1]
    found = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)
    if broken is None:
        return found
    return found.masked_fill((seen & broken[:, None]).any(-1)[:, None, :, None], torch.nan)


def _break_apart(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor | None:
    """The places whose key or value is not finite, [sequences, keys], which become 0; None: there are none."""
    broken = ~(torch.isfinite(key).all(-1).all(1) & torch.isfinite(value).all(-1).all(1))
    if not broken.any():
        return None
    for kept in (key, value):
        kept.masked_fill_(broken[:, None, :, None], 0)
    return broken


def _plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    begin = torch.zeros(query.shape[0], dtype=torch.long, device=query.device)
    return _masked(query, key.clone(), value.clone(), begin, scale, window, slopes).transpose(1, 2).contiguous()
