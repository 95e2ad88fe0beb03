"""Random steps for attention over pages, and what comes out of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from batchgen.engines.paged import attention
from batchgen.engines.paged.layout import AttentionShape, LayerCache, Layout, make_query_blocks
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.rounding import NOT_FINITE, round_numbers
from batchgen.engines.paged.step import Chunk


class Heads(NamedTuple):
    """How many heads there are, and how many numbers they have."""

    queries: int
    keys: int
    key_size: int
    value_size: int

    def __str__(self) -> str:
        return f"{self.queries}/{self.keys}x{self.key_size}/{self.value_size}"


class Features(NamedTuple):
    """What an attention has beside scores, softmax and a sum of values."""

    window: int = 0
    alibi: bool = False
    softcap: float = 0.0
    sinks: bool = False

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._asdict().items() if value) or "plain"


# With a window of 200 some keys of a long sequence are seen by all queries of a block of the kernels.
FEATURES = (
    Features(),
    Features(alibi=True),
    Features(window=37),
    Features(window=200, alibi=True),
    Features(softcap=5.0),
    Features(sinks=True),
    Features(window=37, softcap=5.0),
    Features(window=200, sinks=True),
    Features(window=37, alibi=True, softcap=5.0, sinks=True),
)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of `find_error`, beside float64


@dataclass(frozen=True)
class Case:
    """A step over one layer, on the CPU."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: Layout
    shape: AttentionShape

    def attend(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, LayerCache]:
        """Output and cache of attention in torch; the case stays as it is.

        Args:
            dtype: of all numbers; None: that of the case.
        """
        dtype = dtype or self.query.dtype
        cache = copy_cache(self.layout.caches[0], dtype)
        tensors = [tensor.to(dtype) for tensor in (self.query, self.key, self.value)]
        return attention.attend_in_torch(*tensors, cache, self.layout, self.shape), cache

    def reference(self) -> tuple[torch.Tensor, LayerCache]:
        """Output and cache, in float64."""
        return self.attend(torch.float64)


def copy_cache(cache: LayerCache, dtype: torch.dtype | None = None, device: str = "cpu") -> LayerCache:
    """A copy, with numbers of another type unless they are rounded."""
    kept = [part for part in cache if part is not None]
    return LayerCache(*(part.to(device, None if cache.is_rounded else dtype, copy=True) for part in kept))


DECODING = (1, 5, 16, 17, 64, 65, 200)  # tokens of each sequence
CHUNKS = (
    (3, 3),
    (70, 70),
    (20, 90),
    (130, 131),
    (1, 33),
    (10, 300),
)  # tokens of the chunk, and of its sequence down to its end


def case(heads: Heads, dtype: torch.dtype, features: Features = Features(), *, seed: int = 0) -> Case:  # noqa: B008
    """Sequences that decode and prefill chunks, in pages in no order; one token is padding.

    Some sequences are longer than the window, scores are large enough that the cap bends them, and sinks have about as
    much weight as the keys.
    """
    source = torch.Generator().manual_seed(seed)
    decoding_lengths, chunk_lengths, window = DECODING, CHUNKS, features.window
    if window >= max(DECODING):
        decoding_lengths, chunk_lengths = (*DECODING, window + 90), (*CHUNKS, (130, window + 70))
    sequences = len(decoding_lengths) + len(chunk_lengths)
    columns = max(*decoding_lengths, *(length for _, length in chunk_lengths)) // PAGE_SIZE + 1
    pages = torch.randperm(sequences * columns, generator=source).view(sequences, columns)
    slots = [*range(len(decoding_lengths)), sequences]
    positions = [*(length - 1 for length in decoding_lengths), -1]
    decoding = len(slots)
    chunks = []
    for slot, (count, length) in enumerate(chunk_lengths, len(decoding_lengths)):
        chunks.append(Chunk(len(slots), count, slot, length))
        slots += [slot] * count
        positions += range(length - count, length)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=source).to(dtype)

    cache = LayerCache(*(draw(pages.numel(), heads.keys, PAGE_SIZE, size) for size in heads[2:]))
    layout = Layout(
        [cache],
        torch.cat([pages, torch.zeros(1, columns, dtype=torch.long)]).int(),
        torch.tensor(slots, dtype=torch.int32),
        torch.tensor(positions, dtype=torch.int32),
        decoding,
        chunks,
        torch.tensor([decoding], dtype=torch.int32),
    )
    # Parts of one tensor, as a joined projection gives them.
    mixed = draw(1, len(slots), (heads.queries + heads.keys) * heads.key_size + heads.keys * heads.value_size)
    ends = [heads.queries * heads.key_size, heads.keys * heads.key_size, heads.keys * heads.value_size]
    parts = zip(mixed.split(ends, dim=2), (heads.key_size, heads.key_size, heads.value_size), strict=True)
    query, key, value = (part.unflatten(2, (-1, size)).transpose(1, 2) for part, size in parts)
    # Slopes are so small that the keys at the end of a window still count.
    slopes = 0.02 * torch.rand(heads.queries, generator=source) if features.alibi else None
    sinks = (4 + torch.randn(heads.queries, generator=source)).to(dtype) if features.sinks else None
    scale = heads.key_size**-0.5 * max(1.0, features.softcap / 2)
    return Case(query, key, value, layout, AttentionShape(scale, window, slopes, features.softcap, sinks))


def with_stale_cache(of: Case) -> Case:
    """The same step over a cache that holds NaN wherever its sequences have nothing, or nothing that a window shows."""
    layout = of.layout
    before = [part for part in layout.caches[0] if part is not None]
    if layout.caches[0].is_rounded:  # whose numbers are never NaN
        parts = [torch.full_like(part, NOT_FINITE if part.dtype == torch.uint8 else 448.0) for part in before]
    else:
        parts = [torch.full_like(part, torch.nan) for part in before]
    decoding = [(slot, 1, int(layout.positions[slot]) + 1) for slot in range(layout.decoding)]
    for slot, count, length in [*decoding, *((chunk.slot, chunk.count, chunk.length) for chunk in layout.chunks)]:
        first = max(0, length - count + 1 - of.shape.window) if of.shape.window else 0
        places = torch.arange(min(first, length), length)
        at = layout.block_table[slot, places // PAGE_SIZE].long()
        for stale, part in zip(parts, before, strict=True):
            stale[at, :, places % PAGE_SIZE] = part[at, :, places % PAGE_SIZE]
    return replace(of, layout=replace(layout, caches=[LayerCache(*parts)]))


def with_rounded_cache(of: Case) -> Case:
    """The same step over a cache of 8 bits. The largest numbers of keys, and of values, differ by a factor of 2**12."""
    source = torch.Generator().manual_seed(1)
    halves = []
    for half in of.layout.caches[0].halves:
        assert isinstance(half, torch.Tensor)
        sizes = torch.randint(-12, 1, half.shape[:-1], generator=source)[..., None]
        halves.append(round_numbers(half.float() * 2.0 ** (sizes if half is of.layout.caches[0].values else sizes / 4)))
    cache = LayerCache(*(half.numbers for half in halves), *(half.exponents for half in halves))
    return replace(of, layout=replace(of.layout, caches=[cache]))


def make_wrong_shapes(shape: AttentionShape) -> dict[str, AttentionShape]:
    """Shapes that differ from this one in one of the features that it has, each under what is wrong with it."""
    wrong = {}
    if shape.window:
        wrong["a window that is shorter by one"] = shape._replace(window=shape.window - 1)
        wrong["a window that is longer by one"] = shape._replace(window=shape.window + 1)
        wrong["no window"] = shape._replace(window=0)
    if shape.slopes is not None:
        wrong["no biases"] = shape._replace(slopes=None)
    if shape.softcap:
        wrong["no cap"] = shape._replace(softcap=0.0)
        wrong["half of the cap"] = shape._replace(softcap=shape.softcap / 2)
    if shape.sinks is not None:
        wrong["no sinks"] = shape._replace(sinks=None)
        wrong["sinks that are scaled"] = shape._replace(sinks=shape.sinks * shape.scale)
        wrong["sinks in each of two splits"] = shape._replace(sinks=shape.sinks + math.log(2))
        wrong["sinks in the order of another head"] = shape._replace(sinks=shape.sinks.roll(1))
    return wrong


def with_broken_token(of: Case, chunk: int, token: int, number: float) -> Case:
    """The same step where the key and value of a token of that chunk are `number`."""
    key, value = of.key.clone(), of.value.clone()
    for tensor in (key, value):
        tensor[:, :, of.layout.chunks[chunk].first + token] = number
    return replace(of, key=key, value=value)


def with_broken_key(of: Case, *tokens: int) -> Case:
    """The same step where one number of the keys of these tokens of the step is infinite, so that their scores are."""
    key = of.key.clone()
    key[:, :, list(tokens), 0] = torch.inf
    return replace(of, key=key)


def find_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of a token's output, from two of [1, tokens, heads, value size].

    What is NaN in one and not in the other is an infinite error.
    """
    if not torch.equal(actual.isnan(), expected.isnan()):
        return torch.inf
    actual, expected = (one.double().nan_to_num().flatten(2) for one in (actual, expected))
    return ((actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)).max().item()


def find_kernel_errors(of: Case, device: str, splits: int) -> tuple[float, float]:
    """Of the kernels: the output's error, and the largest difference of a number in the cache."""
    from batchgen.engines.paged import kernels

    expected, kept = of.reference()
    layout = of.layout
    assert layout.decoding_count is not None
    moved = replace(
        layout,
        caches=[copy_cache(layout.caches[0], device=device)],
        block_table=layout.block_table.to(device),
        slots=layout.slots.to(device),
        positions=layout.positions.to(device),
        decoding=layout.decoding + 3,  # as a graph has it: more programs than sequences
        decoding_count=layout.decoding_count.to(device),
        query_blocks=torch.cat([make_query_blocks(layout.chunks), torch.zeros(2, 2, dtype=torch.int32)]).to(device),
        splits=splits,
    )
    query, key, value = (tensor.to(device) for tensor in (of.query, of.key, of.value))
    shape = AttentionShape(*(field.to(device) if isinstance(field, torch.Tensor) else field for field in of.shape))
    with poisoned():
        out = kernels.attend(query, key, value, moved.caches[0], moved, shape)
    real = layout.positions >= 0
    differences = [
        (half.cpu().double() - other.double()).nan_to_num()
        for half, other in zip(moved.caches[0], kept, strict=True)
        if half is not None and other is not None
    ]
    return find_error(out.cpu()[:, real], expected[:, real]), max(one.abs().max().item() for one in differences)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is not written shows."""
    empty = torch.empty

    def poison(*sizes: object, **options: object) -> torch.Tensor:
        tensor: torch.Tensor = empty(*sizes, **options)  # type: ignore[call-overload]
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -1)

    torch.empty = poison
    try:
        yield
    finally:
        torch.empty = empty
