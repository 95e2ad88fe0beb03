"""Attention beside another version's kernels: `python benchmarks/prefill.py OTHER`, on one GPU.

OTHER is the root of another version of batchgen. The steps are those of `attention.py`. Milliseconds are medians; each
pair is timed twice, in turn, and the ratio is that of the smaller ones. The outputs of both are compared.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import torch
import triton
from attention import Kind, Work, make_works

from batchgen.engines.paged import kernels, pages
from batchgen.engines.paged.layout import Layout

MODELS = {
    "llama-8b": "32/8x128/128",
    "bloom-7b1": "32/32x128/128,alibi",
    "llama-8b, window 4096": "32/8x128/128,window=4096",
    "qwen3-0.6b": "16/8x128/128",
}


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


def compare(model: str, step: str, work: Work, other: ModuleType) -> str:
    """A line of the table."""
    tensors, of = (work.query, work.key, work.value), work.layout

    def attend(module: ModuleType) -> torch.Tensor:
        # Earlier versions took keys and values as the halves of one tensor.
        cache = of.caches[0] if hasattr(module, "LayerCache") else of.caches[0].keys._base
        arguments: tuple[object, ...] = (of, work.shape)
        if "shape" not in inspect.signature(module.attend).parameters:
            arguments = (OldLayout(of), work.shape.scale, work.shape.window, work.shape.slopes)
        out: torch.Tensor = module.attend(*tensors, cache, *arguments)
        return out

    apart = (attend(other).float() - attend(kernels).float()).abs().max().item()
    times: dict[ModuleType, list[float]] = {other: [], kernels: []}
    for module in (other, kernels) * 2:
        times[module].append(triton.testing.do_bench(lambda module=module: attend(module), return_mode="median"))
    ratio = min(times[kernels]) / min(times[other])
    figures = " | ".join(f"{one:.3f}" for one in [*times[other], *times[kernels]])
    return f"| {model} | {step} | {figures} | {ratio:.3f} | {apart:.1e} |"


def main(root: str) -> None:
    """Prints the table."""
    other = load(Path(root))
    print("| heads of | step | other, ms | again | this, ms | again | this / other | apart |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for model in MODELS:
        for kernel, step, work in make_works(Kind.parse(MODELS[model])):
            print(compare(model, f"{kernel} {step}", work, other), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
