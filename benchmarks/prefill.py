"""Attention of prefill chunks, beside another version's kernels: `python benchmarks/prefill.py OTHER`, on one GPU.

OTHER is the root of another version of batchgen. Milliseconds are medians; each pair is timed twice, in turn, and the
ratio is that of the smaller ones. The outputs of both are compared.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
import triton

from batchgen.engines.paged import kernels, pages
from batchgen.engines.paged.layout import AttentionShape, Layout, make_query_blocks
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.step import Chunk

# Heads, key heads, ALiBi, window; all of 128 numbers.
MODELS = {
    "llama-8b": (32, 8, False, 0),
    "bloom-7b1": (32, 32, True, 0),
    "llama-8b, window 4096": (32, 8, False, 4096),
    "qwen3-0.6b": (16, 8, False, 0),
}
# Tokens of each sequence, those of its chunk, and how many such sequences.
STEPS = ((8192, 8192, 1), (16384, 4096, 1), (512, 512, 8), (100, 100, 40))
HEAD = 128


def layout(length: int, count: int, sequences: int, key_heads: int) -> Layout:
    """A step of nothing but prefill chunks, in pages in no order."""
    columns = length // PAGE_SIZE + 1
    cache = torch.randn(2, sequences * columns, key_heads, PAGE_SIZE, HEAD, device="cuda").bfloat16()
    table = torch.randperm(sequences * columns, device="cuda").view(sequences, columns).int()
    chunks = [Chunk(slot * count, count, slot, length) for slot in range(sequences)]
    slots = torch.arange(sequences, device="cuda").repeat_interleave(count).int()
    positions = torch.arange(length - count, length, device="cuda").repeat(sequences).int()
    none = torch.zeros(1, dtype=torch.int32, device="cuda")
    return Layout([cache], table, slots, positions, 0, chunks, none, query_blocks=make_query_blocks(chunks).cuda())


class OldLayout:
    """A `Layout` under the names that its fields had before, for the kernels of a version from then."""

    def __init__(self, layout: Layout) -> None:
        self.caches, self.table = layout.caches, layout.block_table
        self.slots, self.positions, self.decoding = layout.slots, layout.positions, layout.decoding
        self.count, self.blocks, self.splits = layout.decoding_count, layout.query_blocks, layout.splits


def load(root: Path) -> ModuleType:
    """The kernels of another version, which may have had its modules and names elsewhere."""
    package = root / "batchgen" / "engines" / "paged"
    if not package.exists():
        package = root / "batchgen" / "paged"
        sys.modules.setdefault("batchgen.paged.pages", pages)
    if not hasattr(pages, "SIZE"):
        pages.SIZE = pages.PAGE_SIZE  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("other_kernels", package / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["other_kernels"] = module  # Triton looks its source up there
    spec.loader.exec_module(module)
    return module


def compare(model: str, step: Sequence[int], other: ModuleType) -> str:
    """A line of the table."""
    heads, key_heads, alibi, window = MODELS[model]
    length, count, sequences = step
    of = layout(length, count, sequences, key_heads)
    mixed = torch.randn(1, count * sequences, heads + 2 * key_heads, HEAD, device="cuda").bfloat16()
    query, key, value = (part.transpose(1, 2) for part in mixed.split([heads, key_heads, key_heads], dim=2))
    slopes = torch.rand(heads, device="cuda") if alibi else None

    def attend(module: ModuleType) -> torch.Tensor:
        arguments: tuple[object, ...] = (of, AttentionShape(HEAD**-0.5, window, slopes))
        if "shape" not in inspect.signature(module.attend).parameters:
            arguments = (OldLayout(of), HEAD**-0.5, window, slopes)
        out: torch.Tensor = module.attend(query, key, value, of.caches[0], *arguments)
        return out

    apart = (attend(other).float() - attend(kernels).float()).abs().max().item()
    times: dict[ModuleType, list[float]] = {other: [], kernels: []}
    for module in (other, kernels) * 2:
        times[module].append(triton.testing.do_bench(lambda module=module: attend(module), return_mode="median"))
    ratio = min(times[kernels]) / min(times[other])
    figures = " | ".join(f"{one:.3f}" for one in [*times[other], *times[kernels]])
    return f"| {model} | {sequences} x {count} of {length} | {figures} | {ratio:.3f} | {apart:.1e} |"


def main(root: str) -> None:
    """Prints the table."""
    other = load(Path(root))
    print("| heads of | chunks | other, ms | again | this, ms | again | this / other | apart |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for model in MODELS:
        for step in STEPS:
            print(compare(model, step, other), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
