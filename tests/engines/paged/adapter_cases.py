"""Tokens and their adapters, what these add by definition, and the kernels beside it.

`python -m tests.engines.paged.adapter_cases [cuda]` runs the kernels: on a GPU, or, where Triton is told to interpret
them, on the CPU. Outputs are poisoned before they are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from batchgen.engines.paged.adapters import LayerAdapters
from tests.engines.paged.attention_cases import poisoned
from tests.engines.paged.expert_cases import TOLERANCES
from tests.kernels import say_cases


class Case(NamedTuple):
    tokens: int
    adapters: int
    without: float = 0.3  # share of the tokens that have none
    depth: int = 24
    columns: int = 40
    rank: int = 16


CASES = (
    Case(1, 1, 0.0),
    Case(5, 1),
    Case(9, 2),
    Case(40, 3),
    Case(70, 5, 0.9, rank=32),
    Case(12, 3, 1.0),
    Case(33, 17, 0.0),
)


def make_layer(case: Case) -> LayerAdapters:
    source = torch.Generator().manual_seed(case.tokens)
    down = torch.randn(case.adapters, case.rank, case.depth, generator=source)
    return LayerAdapters(down, torch.randn(case.adapters, case.columns, case.rank, generator=source))


def make_step(case: Case, seed: int) -> list[torch.Tensor]:
    """The inputs of a layer, [tokens, depth], and the adapter of each token, from 1; 0: none."""
    source = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, case.adapters + 1, (case.tokens,), generator=source, dtype=torch.int32)
    numbers.masked_fill_(torch.rand(case.tokens, generator=source) < case.without, 0)
    return [torch.randn(case.tokens, case.depth, generator=source), numbers]


def expect(layer: LayerAdapters, inputs: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The definition: token by token, in float64. [tokens, columns]"""
    added = torch.zeros(len(inputs), layer.up.shape[1], dtype=torch.float64)
    for token, number in enumerate(numbers.tolist()):
        if number:
            added[token] = layer.up[number - 1].double() @ (layer.down[number - 1].double() @ inputs[token].double())
    return added


def measure_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-9))


def parts(device: str) -> Iterator[tuple[str, bool]]:
    """Each case in words, by the kernels in the order of `adapters.add_to`, and whether it is right."""
    from batchgen.engines.paged.experts import combining_kernel, grouped_gemm_kernel, routing_kernel
    from batchgen.engines.paged.experts.grouped_gemm import Sorting

    for case in CASES:
        layer, (inputs, numbers) = make_layer(case), make_step(case, 1)
        down, up, given = layer.down.to(device), layer.up.to(device), inputs.to(device)
        index = torch.where(numbers > 0, numbers - 1, case.adapters)[:, None].to(device)
        with poisoned():
            order, inverse, offsets = routing_kernel.sort_by_expert(index, case.adapters)
            inner = grouped_gemm_kernel.multiply(given, down, None, Sorting(order, offsets, 1))
            outputs = grouped_gemm_kernel.multiply(inner, up, None, Sorting(order, offsets, 0))
            ones = torch.ones_like(index, dtype=torch.float32)
            added = combining_kernel.combine(outputs, inverse[:, None], ones, index, case.adapters)
        error = measure_error(added, expect(layer, inputs, numbers))
        yield f"{case}: {error:.1e}", error < TOLERANCES[torch.float32]


def compute(layer: LayerAdapters, inputs: torch.Tensor, numbers: torch.Tensor, output: torch.Tensor) -> None:
    """What the engine does in a step, with a single layer."""
    from batchgen.engines.paged.adapters import add_to, sort_by_adapter
    from batchgen.engines.paged.layout import Layout, lay_out

    rows = sort_by_adapter(numbers, len(layer.down))
    with lay_out(Layout([], numbers[None], numbers, numbers, 0, adapters=rows)):
        add_to(output.zero_(), inputs, layer)


def layers(device: str) -> Iterator[tuple[str, bool]]:
    """As `parts`, of whole layers on a GPU: each in a CUDA graph that is replayed with other adapters and inputs."""
    cases = [*CASES, Case(4000, 3, depth=64, columns=128), Case(64, 8, depth=2048, columns=6144)]
    for case in cases if device == "cuda" else ():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            layer = LayerAdapters(*(tensor.to(device, dtype) for tensor in make_layer(case)))
            inputs, numbers = (one.to(device) for one in make_step(case, 5))
            inputs, graph = inputs.to(dtype), torch.cuda.CUDAGraph()
            output = torch.zeros(case.tokens, case.columns, dtype=dtype, device=device)
            compute(layer, inputs, numbers, output)  # compiles the kernels
            with torch.cuda.graph(graph):
                compute(layer, inputs, numbers, output)
            for target, source in zip((inputs, numbers), make_step(case, 6), strict=True):
                target.copy_(source)
            graph.replay()
            on_host = LayerAdapters(*(tensor.cpu() for tensor in layer))
            error = measure_error(output, expect(on_host, inputs.cpu(), numbers.cpu()))
            yield f"{dtype} {case}: {error:.1e}", error < TOLERANCES[dtype]


if __name__ == "__main__":
    say_cases(parts, layers)
