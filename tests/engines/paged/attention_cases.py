"""Random steps for attention over pages, and what comes out of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from batchgen.engines.paged import attention
from batchgen.engines.paged.layout import AttentionShape, Layout, make_query_blocks
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.step import Chunk


@dataclass(frozen=True)
class Case:
    """A step over one layer, on the CPU."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: Layout
    shape: AttentionShape

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and cache, in float64."""
        cache = self.layout.caches[0].to(torch.float64, copy=True)
        tensors = (self.query.double(), self.key.double(), self.value.double(), cache)
        slopes = None if self.shape.slopes is None else self.shape.slopes.double()
        return attention.attend_in_torch(*tensors, self.layout, self.shape._replace(slopes=slopes)), cache


DECODING = (1, 5, 16, 17, 64, 65, 200)  # tokens of each sequence
CHUNKS = (
    (3, 3),
    (70, 70),
    (20, 90),
    (130, 131),
    (1, 33),
    (10, 300),
)  # tokens of the chunk, and of its sequence down to its end


def case(
    heads: tuple[int, int, int], dtype: torch.dtype, *, window: int = 0, alibi: bool = False, seed: int = 0
) -> Case:
    """Sequences that decode and prefill chunks, in pages in no order; one token is padding.

    Args:
        heads: how many of the query, how many of the keys, and numbers of each.
    """
    query_heads, key_heads, size = heads
    source = torch.Generator().manual_seed(seed)
    sequences = len(DECODING) + len(CHUNKS)
    columns = max(*DECODING, *(length for _, length in CHUNKS)) // PAGE_SIZE + 1
    pages = torch.randperm(sequences * columns, generator=source).view(sequences, columns)
    cache = torch.randn(2, pages.numel(), key_heads, PAGE_SIZE, size, generator=source).to(dtype)
    slots, positions = [*range(len(DECODING)), sequences], [*(length - 1 for length in DECODING), -1]
    decoding = len(slots)
    chunks = []
    for slot, (count, length) in enumerate(CHUNKS, len(DECODING)):
        chunks.append(Chunk(len(slots), count, slot, length))
        slots += [slot] * count
        positions += range(length - count, length)
    table = torch.cat([pages, torch.zeros(1, columns, dtype=torch.long)]).int()
    layout = Layout(
        [cache],
        table,
        torch.tensor(slots, dtype=torch.int32),
        torch.tensor(positions, dtype=torch.int32),
        decoding,
        chunks,
        torch.tensor([decoding], dtype=torch.int32),
    )
    mixed = torch.randn(1, len(slots), query_heads + 2 * key_heads, size, generator=source).to(dtype)
    query, key, value = (part.transpose(1, 2) for part in mixed.split([query_heads, key_heads, key_heads], dim=2))
    slopes = torch.rand(query_heads, generator=source) if alibi else None
    return Case(query, key, value, layout, AttentionShape(size**-0.5, window, slopes))


def with_stale_cache(of: Case) -> Case:
    """The same step over a cache that holds NaN wherever its sequences have nothing."""
    layout = of.layout
    cache = torch.full_like(layout.caches[0], torch.nan)
    lengths = [*enumerate(DECODING), *((chunk.slot, chunk.length) for chunk in layout.chunks)]
    for slot, length in lengths:
        places = torch.arange(length)
        at = layout.block_table[slot, places // PAGE_SIZE].long()
        cache[:, at, :, places % PAGE_SIZE] = layout.caches[0][:, at, :, places % PAGE_SIZE]
    return replace(of, layout=replace(layout, caches=[cache]))


def with_broken_token(of: Case, chunk: int, token: int, number: float) -> Case:
    """The same step where the key and value of a token of that chunk are `number`."""
    key, value = of.key.clone(), of.value.clone()
    for tensor in (key, value):
        tensor[:, :, of.layout.chunks[chunk].first + token] = number
    return replace(of, key=key, value=value)


def errors(of: Case, device: str, splits: int) -> tuple[float, float]:
    """Of the kernels: the output's relative error, and the largest difference of a value in the cache.

    What is NaN in one and not in the other is an infinite error.
    """
    from batchgen.engines.paged import kernels

    expected, kept = of.reference()
    layout = of.layout
    assert layout.decoding_count is not None
    moved = replace(
        layout,
        caches=[layout.caches[0].clone().to(device)],
        block_table=layout.block_table.to(device),
        slots=layout.slots.to(device),
        positions=layout.positions.to(device),
        decoding=layout.decoding + 3,  # as a graph has it: more programs than sequences
        decoding_count=layout.decoding_count.to(device),
        query_blocks=torch.cat([make_query_blocks(layout.chunks), torch.zeros(2, 2, dtype=torch.int32)]).to(device),
        splits=splits,
    )
    query, key, value = (tensor.to(device) for tensor in (of.query, of.key, of.value))
    slopes = None if of.shape.slopes is None else of.shape.slopes.to(device)
    with poisoned():
        out = kernels.attend(query, key, value, moved.caches[0], moved, of.shape._replace(slopes=slopes))
    real = layout.positions >= 0
    actual, expected = out.cpu().double()[:, real], expected[:, real]
    changed = moved.caches[0].cpu().double() - kept
    if not torch.equal(actual.isnan(), expected.isnan()):
        return torch.inf, torch.inf
    difference = (actual - expected).nan_to_num().norm() / expected.nan_to_num().norm()
    return difference.item(), changed.nan_to_num().abs().max().item()


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
