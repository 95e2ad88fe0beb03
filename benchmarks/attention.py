"""Attention of `paged` under several settings of its kernels: `python benchmarks/attention.py [KIND ...]`, on one GPU.

For each kind of attention, and for steps that decode and prefill chunks, it writes the median time in microseconds, and
the keys and values read in GB/s or the products in TFLOP/s. At the end it writes, for each kernel and each size in the
tables of `kernels`, the settings by their geometric mean of time over that of the best, and whether they fit all kinds.
A KIND is a name in KINDS, or written out as those are: `16/8x256/256,window=1024`; with `,fp8` the cache is one of
8 bits. Each takes a minute or two, most of
which the compiler needs.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton

from batchgen.engines.paged import kernel_settings, kernels
from batchgen.engines.paged.kernel_settings import Settings
from batchgen.engines.paged.layout import AttentionShape, LayerCache, Layout, make_query_blocks
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.rounding import round_numbers
from batchgen.engines.paged.step import Chunk

# Heads / key heads x key size / value size, then features: window, softcap, sinks, alibi.
KINDS = {
    "llama-8b": "32/8x128/128",
    "bloom-7b1": "32/32x128/128,alibi",
    "gemma-2-9b": "16/8x256/256,softcap=50",
    "gemma-2-9b, window": "16/8x256/256,softcap=50,window=4096",
    "gemma-3-12b": "16/8x256/256",
    "gemma-3-12b, window": "16/8x256/256,window=1024",
    "gpt-oss": "64/8x64/64,sinks",
    "gpt-oss, window": "64/8x64/64,sinks,window=128",
    "deepseek-v2-lite": "16/16x192/128",
    "phi-3-mini, window": "32/32x96/96,window=2047",
}
DECODES = ((512, 400, 1), (64, 4000, 1), (4, 8000, 16))  # sequences, their tokens, splits
PREFILLS = (
    (1, 8192, 8192),
    (1, 2048, 16384),
    (8, 512, 512),
    (40, 100, 100),
)  # sequences, tokens of a chunk, all tokens
DECODE_CANDIDATES = [Settings(*one) for one in itertools.product((32, 64), (2, 4), (2, 3))]
ROUNDED_DECODE_CANDIDATES = [Settings(*one) for one in itertools.product((32, 64, 128), (2, 4), (1, 2))]
PREFILL_CANDIDATES = [Settings(*one) for one in itertools.product((32, 64, 128), (4, 8), (2, 3))]


@dataclass(frozen=True)
class Kind:
    """The attention of a layer."""

    heads: int
    key_heads: int
    key_size: int
    value_size: int
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    fp8: bool = False

    @classmethod
    def parse(cls, text: str) -> Kind:
        """A kind as KINDS has them; ValueError if it is none."""
        sizes, *features = text.split(",")
        (heads, key_heads), (key_size, value_size) = (part.split("/") for part in sizes.split("x"))
        kind = cls(int(heads), int(key_heads), int(key_size), int(value_size))
        for name, _, number in (feature.partition("=") for feature in features):
            given = {"window": int, "softcap": float, "sinks": bool, "alibi": bool, "fp8": bool}[name](number or True)
            kind = Kind(**{**vars(kind), name: given})
        return kind

    def make_shape(self) -> AttentionShape:
        """What the kernels take, on the GPU."""
        slopes = torch.rand(self.heads, device="cuda") / 100 if self.alibi else None
        sinks = torch.randn(self.heads, device="cuda").bfloat16() if self.sinks else None
        return AttentionShape(self.key_size**-0.5, self.window, slopes, self.softcap, sinks)


class Work(NamedTuple):
    """A step of one layer on the GPU."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: Layout
    shape: AttentionShape
    amount: float  # bytes of keys and values that are read, or operations of products
    unit: str  # what is said of that: GB/s or TFLOP/s

    def attend(self) -> torch.Tensor:
        """Attention by the kernels."""
        return kernels.attend(self.query, self.key, self.value, self.layout.caches[0], self.layout, self.shape)


def make_decode(kind: Kind, sequences: int, length: int, splits: int) -> Work:
    """A step in which as many sequences, all of `length` tokens, decode."""
    positions = torch.full((sequences,), length - 1)
    layout = _make_layout(kind, torch.arange(sequences), positions, [])
    seen = min(length, kind.window or length)
    numbers = sequences * seen * kind.key_heads * (kind.key_size + kind.value_size)
    read = numbers * (1 if kind.fp8 else 2)
    layout = replace(layout, decoding=sequences, splits=splits, query_blocks=None)
    return Work(*_make_tensors(kind, sequences), layout, kind.make_shape(), read, "GB/s")


def make_prefill(kind: Kind, sequences: int, count: int, length: int) -> Work:
    """A step of chunks of `count` tokens, which are the last ones of as many sequences of `length`."""
    slots = torch.arange(sequences).repeat_interleave(count)
    places = torch.arange(length - count, length)
    chunks = [Chunk(slot * count, count, slot, length) for slot in range(sequences)]
    layout = _make_layout(kind, slots, places.repeat(sequences), chunks)
    pairs = sequences * (places + 1).clamp(max=kind.window or length).sum().item()
    operations = 2 * pairs * kind.heads * (kind.key_size + kind.value_size)
    return Work(*_make_tensors(kind, sequences * count), layout, kind.make_shape(), operations, "TFLOP/s")


def _make_layout(kind: Kind, slots: torch.Tensor, positions: torch.Tensor, chunks: list[Chunk]) -> Layout:
    """Sequences in pages in no order; none of the tokens decodes."""
    sequences, columns = int(slots.max()) + 1, int(positions.max()) // PAGE_SIZE + 1
    table = torch.randperm(sequences * columns, device="cuda").view(sequences, columns).int()
    # One tensor, where both sizes are equal: kernels of earlier versions take it as a whole.
    if kind.key_size == kind.value_size:
        both = (2, len(table) * columns, kind.key_heads, PAGE_SIZE, kind.key_size)
        cache = LayerCache(*torch.randn(both, device="cuda", dtype=torch.bfloat16))
    else:
        sizes = ((len(table) * columns, kind.key_heads, PAGE_SIZE, one) for one in (kind.key_size, kind.value_size))
        cache = LayerCache(*(torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in sizes))
    if kind.fp8:
        rounded = [round_numbers(half) for half in cache[:2]]
        cache = LayerCache(*(half.numbers for half in rounded), *(half.exponents for half in rounded))
    count = torch.tensor([0 if chunks else len(slots)], dtype=torch.int32, device="cuda")
    blocks = make_query_blocks(chunks).cuda()
    return Layout([cache], table, slots.int().cuda(), positions.int().cuda(), 0, chunks, count, blocks)


def _make_tensors(kind: Kind, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = (kind.key_size, kind.key_size, kind.value_size)
    widths = [heads * size for heads, size in zip((kind.heads, kind.key_heads, kind.key_heads), sizes, strict=True)]
    parts = torch.randn(1, tokens, sum(widths), device="cuda", dtype=torch.bfloat16).split(widths, dim=2)
    query, key, value = (part.unflatten(2, (-1, size)).transpose(1, 2) for part, size in zip(parts, sizes, strict=True))
    return query, key, value


def make_works(kind: Kind) -> Iterator[tuple[str, str, Work]]:
    """The steps of a kind: the kernel, the step in words, and the step."""
    of_8_bits = ", fp8" if kind.fp8 else ""
    for sequences, length, splits in DECODES:
        words = f"{sequences} rows of {length}, {splits} splits"
        yield f"decode{of_8_bits}", words, make_decode(kind, sequences, length, splits)
    for sequences, count, length in PREFILLS:
        words = f"{sequences} x {count} of {length}"
        yield f"prefill{of_8_bits}", words, make_prefill(kind, sequences, count, length)


def measure(work: Work) -> float:
    """Median microseconds; infinite: the kernel does not fit the GPU."""
    try:
        return 1e3 * triton.testing.do_bench(work.attend, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return math.inf


def main(*names: str) -> None:
    """Prints the tables."""
    of_kernel = {
        "decode": (kernel_settings.DECODE, DECODE_CANDIDATES),
        "prefill": (kernel_settings.PREFILL, PREFILL_CANDIDATES),
        "decode, fp8": (kernel_settings.ROUNDED_DECODE, ROUNDED_DECODE_CANDIDATES),
        "prefill, fp8": (kernel_settings.ROUNDED_PREFILL, PREFILL_CANDIDATES),
    }
    times: dict[tuple[str, int], dict[Settings, list[float]]] = {}
    print("| kind | kernel | step | keys, warps, stages | us | |\n|---|---|---|---|--:|--:|")
    for name in names or KINDS:
        written = name.removesuffix(",fp8")
        kind = Kind.parse(KINDS.get(written, written) + name.removeprefix(written))
        for kernel, step, work in make_works(kind):
            table, candidates = of_kernel[kernel]
            before = dict(table)
            size = min(size for size in before if size >= max(kind.key_size, kind.value_size))
            measured = {}
            for settings in candidates:
                table[size] = settings
                measured[settings] = measure(work)
            table.update(before)
            best = min(measured.values())
            for settings, time in sorted(measured.items(), key=lambda one: one[1]):
                times.setdefault((kernel, size), {}).setdefault(settings, []).append(time / best)
                mark = " (in the table)" if settings == before[size] else ""
                speed = f"{work.amount / time / (1e3 if work.unit == 'GB/s' else 1e6):.0f} {work.unit}"
                figures = f"{time:.1f} | {speed}" if time < math.inf else "does not fit |"
                print(f"| {name} | {kernel} | {step} | {', '.join(map(str, settings))}{mark} | {figures} |", flush=True)
    for (kernel, size), ratios in times.items():
        print(f"\n{kernel}, up to {size}: settings, time / best of each step (geometric mean, worst)")
        means = {settings: math.exp(sum(map(math.log, each)) / len(each)) for settings, each in ratios.items()}
        for settings, mean in sorted(means.items(), key=lambda one: one[1]):
            print(f"{tuple(settings)}: {mean:.3f}, {max(ratios[settings]):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
