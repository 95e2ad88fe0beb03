"""Products of quantised weights beside float64: `python -m tests.engines.paged.quantised_cases [cuda]`.

On a GPU, or, where Triton is told to interpret them, on the CPU; SCHEMES=0,3 takes some of `SCHEMES`. Outputs are
poisoned before they are written. The reference multiplies what the inputs are rounded to by what the weight stands for,
both by `QuantisedWeight`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

from batchgen.models.quantised.weight import Inputs, Kind, QuantisedWeight
from tests.engines.paged.attention_cases import poisoned
from tests.engines.paged.expert_cases import Case, route
from tests.kernels import say_cases

TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Scheme(NamedTuple):
    kind: Kind
    group: int = 0  # 0: one for all columns
    zeros: bool = False
    inputs: Inputs = ""
    inputs_group: int = 0
    scales: torch.dtype = torch.float32


SCHEMES = (
    Scheme("int4", 32, zeros=True, scales=torch.float16),
    Scheme("int4", 64),
    Scheme("int4", 128, zeros=True, scales=torch.bfloat16),
    Scheme("int4"),
    Scheme("mxfp4", 32, scales=torch.float8_e8m0fnu),
    Scheme("fp8", inputs="fp8"),
    Scheme("fp8", 128, inputs="fp8", inputs_group=128),
    Scheme("fp8"),
    Scheme("fp8", 128),
    Scheme("int8", inputs="int8"),
    Scheme("int8", 64, scales=torch.float16),
)


def make_weight(scheme: Scheme, rows: int, columns: int, seed: int, experts: int = 0) -> QuantisedWeight:
    """A random weight whose numbers are of about 1."""
    source = torch.Generator().manual_seed(seed)
    shape = [*([experts] if experts else []), rows, columns]
    groups = [*shape[:-1], -(-columns // scheme.group) if scheme.group else 1]
    sizes = torch.rand(groups, generator=source) + 0.5
    zeros = torch.randint(0, 16, groups, generator=source).to(torch.uint8) if scheme.zeros else None
    if scheme.kind in ("int4", "mxfp4"):
        shape[-1] //= 2
        values = torch.randint(0, 256, shape, generator=source).to(torch.uint8)
    elif scheme.kind == "int8":
        values = torch.randint(-128, 128, shape, generator=source).to(torch.int8)
        sizes /= 64
    else:
        values = torch.randn(shape, generator=source).to(torch.float8_e4m3fn)
    if scheme.kind == "mxfp4":
        scales = torch.randint(118, 129, groups, generator=source).to(torch.uint8).view(torch.float8_e8m0fnu)
    else:
        scales = sizes.to(scheme.scales)
    return QuantisedWeight(scheme.kind, values, scales, zeros, None, scheme.inputs, None, scheme.inputs_group)


def expect(weight: QuantisedWeight, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product in float64."""
    return F.linear(
        weight.round_inputs(inputs).double(), weight.widen().double(), None if bias is None else bias.double()
    )


def find_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to all of the expected numbers; infinite where one is NaN that should not be, or the reverse."""
    out = out.cpu().double()
    if not torch.equal(out.isnan(), expected.isnan()):
        return torch.inf
    return float((out - expected).nan_to_num().norm() / expected.nan_to_num().norm().clamp(min=1e-30))


def move(weight: QuantisedWeight, device: str) -> Any:
    """The weight on the device, for kernels."""
    from batchgen.engines.paged.quantised.packing import covers, pack_for_kernels

    assert covers(weight)
    return pack_for_kernels(weight.to(device))


def list_sizes(scheme: Scheme, device: str) -> list[tuple[int, int, int]]:
    """Tokens, rows, columns."""
    if device != "cuda":  # the interpreter takes seconds for large cases
        sizes = [(1, 40, 256), (20, 33, 640), (70, 130, 256)]
        return sizes if scheme.inputs_group else [*sizes, (5, 24, 576 if scheme.group < 128 else 384)]
    sizes = [(1, 4096, 4096), (7, 72, 2048), (16, 1000, 1280), (33, 640, 5120), (64, 4096, 1024), (65, 130, 2048)]
    sizes += [(200, 1536, 2048), (300, 4096, 1024), (5000, 560, 1280)]
    if scheme.group < 128:
        sizes += [(1, 576, 576), (17, 2880, 2880), (300, 192, 576)]
    if not scheme.group:
        sizes += [(3, 40, 40), (100, 24, 40)]
    return sizes


def dense(device: str) -> Iterator[tuple[str, bool]]:
    """Each case of a linear layer in words, and whether it is right."""
    for number, scheme in list_schemes():
        for at, (tokens, rows, columns) in enumerate(list_sizes(scheme, device)):
            # The interpreter has no bfloat16; on a GPU the compiler takes a second for a case.
            dtype = torch.bfloat16 if device == "cuda" and at % 4 != 2 else torch.float16
            source = torch.Generator().manual_seed(number)
            inputs = torch.randn(tokens, 2 * columns, generator=source).to(dtype)[:, :columns]  # of a larger tensor
            weight = make_weight(scheme, rows, columns, number)
            bias = torch.randn(rows, generator=source).to(dtype) if number % 2 else None
            expected = expect(weight, inputs, bias)
            packed, given = move(weight, device), inputs.to(device)
            with poisoned():
                outs = _multiply(scheme, given, packed, None if bias is None else bias.to(device), at == 0)
            for way, out in outs.items():
                error = find_error(out, expected)
                yield f"{scheme} {dtype} {tokens}x{rows}x{columns} {way}: {error:.1e}", error < TOLERANCES[dtype]


def list_schemes() -> list[tuple[int, Scheme]]:
    """All of them, numbered; or those whose numbers are in the environment's SCHEMES, so that processes share them."""
    wanted = os.environ.get("SCHEMES")
    numbers = map(int, wanted.split(",")) if wanted else range(len(SCHEMES))
    return [(number, SCHEMES[number]) for number in numbers]


def _multiply(
    scheme: Scheme, inputs: torch.Tensor, weight: Any, bias: torch.Tensor | None, all_tiles: bool
) -> dict[str, torch.Tensor]:
    """The product in each way."""
    from batchgen.engines.paged.quantised import eight_bits_kernel, four_bits_kernel, products
    from batchgen.engines.paged.quantised.rounding import round_inputs

    stored: tuple[torch.Tensor, torch.Tensor | None] = inputs, None
    if scheme.inputs:
        stored = round_inputs(inputs, scheme.inputs, scheme.inputs_group)
    outs = {"operator": products.multiply(*stored, weight, bias, inputs.dtype)}
    if not scheme.inputs:
        outs["widened"] = products.multiply_widened(inputs, weight, bias, 300 * inputs.shape[1] * 2)
    if scheme.kind in ("fp8", "int8"):
        kinds = [tile for _, tile in eight_bits_kernel.TILES] if all_tiles else []
        for tile in (*kinds, eight_bits_kernel.LARGEST):
            wanted = eight_bits_kernel.Wanted(inputs.dtype, None, tile)
            outs[str(tile)] = eight_bits_kernel.multiply(*stored, weight, bias, wanted)
        return outs
    kinds4 = [tile for _, tile in four_bits_kernel.TILES] if all_tiles else []
    scaled = four_bits_kernel.LARGEST._replace(scale_weights=True)
    for tile4 in (*kinds4, four_bits_kernel.LARGEST, scaled):
        outs[str(tile4)] = four_bits_kernel.multiply(inputs, weight, bias, None, tile4)
    if all_tiles and inputs.is_cuda:
        outs["without assembly"] = four_bits_kernel.multiply(inputs, weight, bias, assembly=False)
    return outs


def grouped(device: str) -> Iterator[tuple[str, bool]]:
    """As `dense`, of experts."""
    from batchgen.engines.paged.experts.grouped_gemm import Sorting
    from batchgen.engines.paged.experts.routing import sort_in_torch
    from batchgen.engines.paged.quantised import products
    from batchgen.engines.paged.quantised.rounding import round_inputs

    cases = [Case(1, 4, 128, 64, 40), Case(9, 2, 4, 256, 40), Case(70, 2, 4, 128, 40, "few"), Case(0, 2, 4, 128, 24)]
    cases += [Case(40, 4, 12, 128, 40, "others")]
    if device == "cuda":
        cases += [Case(600, 8, 128, 2048, 768), Case(64, 4, 32, 2880, 720), Case(3000, 2, 8, 1024, 1408)]
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    for number, scheme in list_schemes():
        for case in cases:
            if scheme.group and case.width % scheme.group:
                continue
            index, _ = route(case)
            order, _, offsets = sort_in_torch(index, case.experts)
            source = torch.Generator().manual_seed(number)
            by_token = number % 2 == 0
            rows = case.tokens if by_token else len(order)
            inputs = torch.randn(rows, case.width + 16, generator=source).to(dtype)[:, : case.width]
            weight = make_weight(scheme, case.inner, case.width, number, case.experts)
            bias = torch.randn(case.experts, case.inner, generator=source).to(dtype) if number % 4 < 2 else None
            sorting = Sorting(order, offsets, case.top_k if by_token else 0)
            expected = _expect_grouped(weight, inputs, bias, sorting)
            packed, given = move(weight, device), inputs.to(device)
            stored: tuple[torch.Tensor, torch.Tensor | None] = given, None
            if scheme.inputs:
                stored = round_inputs(given, scheme.inputs, scheme.inputs_group)
            moved = Sorting(order.to(device), offsets.to(device), sorting.top_k)
            with poisoned():
                out = products.multiply_grouped(stored, packed, None if bias is None else bias.to(device), moved, dtype)
            error = find_error(out[: int(offsets[-1])], expected)
            yield f"{scheme} {case} by token={by_token}: {error:.1e}", error < TOLERANCES[dtype]


def _expect_grouped(
    weight: QuantisedWeight, inputs: torch.Tensor, bias: torch.Tensor | None, sorting: Any
) -> torch.Tensor:
    rows = inputs[sorting.order // sorting.top_k] if sorting.top_k else inputs
    expected = torch.zeros(int(sorting.offsets[-1]), weight.shape[1], dtype=torch.float64)
    for expert, (begin, end) in enumerate(pairwise(sorting.offsets.tolist())):
        if begin < end:
            one = weight.map(lambda tensor, expert=expert: tensor[expert])
            expected[begin:end] = expect(one, rows[begin:end], None if bias is None else bias[expert])
    return expected


def replays(device: str) -> Iterator[tuple[str, bool]]:
    """As `dense`, of layers on a GPU: each in a CUDA graph that is replayed with other inputs."""
    from batchgen.engines.paged.quantised.held import HeldWeight

    for number, scheme in list_schemes() if device == "cuda" else ():
        for tokens in (1, 16, 64, 128, 300, 2048):
            weight = make_weight(scheme, 512, 1280, number)
            if scheme.kind == "int4" and scheme.zeros:
                order = torch.randperm(1280, generator=torch.Generator().manual_seed(1)).int()
                weight = replace(weight, order=order)
            held = HeldWeight(weight.to(device), torch.bfloat16)
            source = torch.Generator().manual_seed(number)
            first, second = (torch.randn(tokens, 1280, generator=source).bfloat16() for _ in range(2))
            given, graph = first.to(device), torch.cuda.CUDAGraph()
            held.multiply(given, None)  # compiles the kernels
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                out = held.multiply(given, None)
            given.copy_(second)
            graph.replay()
            graph.replay()
            error = find_error(out, expect(weight, second, None))
            yield f"replayed {scheme} {tokens}: {error:.1e}", error < TOLERANCES[torch.bfloat16]


def library(device: str) -> Iterator[tuple[str, bool]]:
    """As `dense` and `grouped`, by package humming-kernels where it is installed, in graphs that are replayed."""
    from batchgen.engines.paged.experts.grouped_gemm import Sorting
    from batchgen.engines.paged.experts.routing import sort_in_torch
    from batchgen.engines.paged.quantised import humming_products

    # Of each number of tokens that it has a kernel for, compilers take seconds.
    fewer = {"_TOKENS": (16, 128, 8192), "_PAIRS": (128, 4096)}
    with mock.patch.multiple(humming_products, **fewer):
        for number, scheme in list_schemes() if device == "cuda" and humming_products.is_installed() else ():
            if scheme.kind not in ("int4", "mxfp4"):
                continue
            dtype = torch.float16 if number == 1 else torch.bfloat16
            for rows, columns in ((512, 1280), (72, 576), (2880, 2880)):
                weight = make_weight(scheme, rows, columns, number)
                if not humming_products.covers(weight.to(device), dtype):
                    continue
                bias = torch.randn(rows, generator=torch.Generator().manual_seed(number)).to(dtype)
                # Within the kernel of some, and added afterwards to others.
                packed = humming_products.pack(weight.to(device), dtype, bias.to(device) if rows != 512 else None)
                for tokens in (1, 17, 300):
                    inputs = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
                    given = bias.to(device) if packed.bias is None else packed.bias
                    out = replay(humming_products.multiply, inputs.to(device), packed, given)
                    error = find_error(out, expect(weight, inputs, bias))
                    yield f"humming {scheme} {tokens}x{rows}x{columns}: {error:.1e}", error < TOLERANCES[dtype]
            cases = Case(9, 2, 4, 256, 40), Case(600, 8, 128, 2048, 768), Case(64, 4, 32, 2880, 720)
            for case in (*cases, Case(40, 4, 12, 128, 40, "others")):
                weight = make_weight(scheme, case.inner, case.width, number, case.experts)
                if not humming_products.covers(weight.to(device), dtype):
                    continue
                order, _, offsets = sort_in_torch(route(case)[0], case.experts)
                source = torch.Generator().manual_seed(number)
                inputs = torch.randn(case.tokens, case.width, generator=source).to(dtype)
                bias = torch.randn(case.experts, case.inner, generator=source).to(dtype)
                packed = humming_products.pack(weight.to(device), dtype, bias.to(device) if case.tokens != 9 else None)
                given = bias.to(device) if packed.bias is None else packed.bias
                moved = Sorting(order.to(device), offsets.to(device), case.top_k)
                out = replay(humming_products.multiply, inputs.to(device), packed, given, moved)
                expected = _expect_grouped(weight, inputs, bias, Sorting(order, offsets, case.top_k))
                error = find_error(out[: int(offsets[-1])], expected)
                yield f"humming {scheme} {case}: {error:.1e}", error < TOLERANCES[dtype]


def replay(multiply: Callable[..., torch.Tensor], inputs: torch.Tensor, *rest: Any) -> torch.Tensor:
    """What a captured product returns when it is replayed twice with `inputs`."""
    given, graph = torch.zeros_like(inputs), torch.cuda.CUDAGraph()
    multiply(given, *rest)  # compiles the kernels
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = multiply(given, *rest)
    given.copy_(inputs)
    graph.replay()
    graph.replay()
    return out


if __name__ == "__main__":
    say_cases(dense, grouped, replays, library)
