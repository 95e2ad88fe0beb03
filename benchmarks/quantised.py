"""Products of quantised weights on one GPU: `python benchmarks/quantised.py [dense|experts|tiles] [MODEL…]`.

`dense` times the linear layers of `LAYERS`, `experts` a layer's two products of `EXPERTS`, each in all ways; `tiles`
searches the tiles of our kernels for the layers of MODEL. TOKENS=1,64 and WAYS=fp8,int4 take some of them;
`humming` and `humming-mxfp4` are ways where package humming-kernels is installed.

Microseconds by replays of a CUDA graph in which each call has weights of its own, at least 256 MB of them, so that they
are not in the cache; the median of nine. Inputs of 8 bits are rounded beforehand.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import graph_timing
import torch
import torch.nn.functional as F

from batchgen.engines.paged import skinny_gemm
from batchgen.engines.paged.experts import grouped_gemm, routing
from batchgen.engines.paged.experts.grouped_gemm import Sorting
from batchgen.engines.paged.quantised import eight_bits_kernel, four_bits_kernel, humming_products, products, programs
from batchgen.engines.paged.quantised.packed import Packed
from batchgen.engines.paged.quantised.packing import pack_for_kernels
from batchgen.engines.paged.quantised.rounding import round_inputs
from batchgen.models.quantised.weight import QuantisedWeight

TOKENS = tuple(map(int, os.environ.get("TOKENS", "1,16,64,128,256,512,2048").split(",")))
FLUSHED = 256e6  # bytes of weights in a graph, at least
GPU = "cuda"
ONLY_COMPILES = False

LAYERS = {  # rows and columns
    "llama-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "bloom-176b": {"qkv": (43008, 14336), "dense": (14336, 14336), "up": (57344, 14336), "down": (14336, 57344)},
}


class Experts(NamedTuple):
    count: int
    top_k: int
    products: dict[str, tuple[int, int]]  # rows and columns


EXPERTS = {
    "qwen3-30b-a3b": Experts(128, 8, {"gate_up": (1536, 2048), "down": (2048, 768)}),
    "gpt-oss-20b": Experts(32, 4, {"gate_up": (5760, 2880), "down": (2880, 2880)}),
}

Call = Callable[[], Any]


def make_weight(kind: str, shape: Sequence[int], group: int = 0) -> QuantisedWeight:
    """Random, on the GPU."""
    *ahead, rows, columns = shape
    groups = columns // group if group else 1
    scales = torch.rand(*ahead, rows, groups, device=GPU) / 64
    if kind in ("int4", "mxfp4"):
        values = torch.randint(0, 256, (*ahead, rows, columns // 2), device=GPU, dtype=torch.uint8)
        if kind == "mxfp4":
            exponents = torch.randint(118, 124, scales.shape, device=GPU, dtype=torch.uint8)
            return QuantisedWeight("mxfp4", values, exponents.view(torch.float8_e8m0fnu))
        zeros = torch.randint(0, 16, scales.shape, device=GPU, dtype=torch.uint8)
        return QuantisedWeight("int4", values, scales.bfloat16(), zeros)
    if kind == "int8":
        values = torch.randint(-127, 128, shape, device=GPU, dtype=torch.int8)
        return QuantisedWeight("int8", values, scales, inputs="int8")
    values = torch.empty(shape, device=GPU, dtype=torch.float8_e4m3fn)
    for part in values.flatten(0, -2).split(1 << 14):
        part.copy_(torch.randn(part.shape, device=GPU, dtype=torch.bfloat16))
    return QuantisedWeight("fp8", values, scales, inputs="fp8", inputs_group=group)


def make_packed(kind: str, shape: Sequence[int]) -> Packed:
    """A random weight for the kernels of a format, or for those of humming-kernels."""
    group = {"int4": fit_group(shape[-1]), "humming": fit_group(shape[-1]), "fp8-blocks": 128}.get(kind, 0)
    if kind.startswith("humming"):
        weight = make_weight("mxfp4", shape, 32) if kind == "humming-mxfp4" else make_weight("int4", shape, group)
        return humming_products.pack(weight, torch.bfloat16)
    return pack_for_kernels(make_weight(kind.partition("-")[0], shape, 32 if kind == "mxfp4" else group))


def fit_group(columns: int) -> int:
    """The group of int4."""
    return next(group for group in (128, 64, 32) if columns % group == 0)


class Layer:
    """The weights of a linear layer in one format, as many as fill `FLUSHED`."""

    def __init__(self, kind: str, rows: int, columns: int) -> None:
        self.kind, self.columns = kind, columns
        size = {"bf16": 2.0, "int4": 0.5, "mxfp4": 0.5, "humming": 0.5, "humming-mxfp4": 0.5}.get(kind, 1.0)
        size *= rows * columns
        count = 1 if ONLY_COMPILES else max(2, -(-int(FLUSHED) // int(size)))
        if kind == "bf16":
            self.weights: list[Any] = [torch.randn(rows, columns, device=GPU).bfloat16() for _ in range(count)]
        else:
            self.weights = [make_packed(kind, (rows, columns)) for _ in range(count)]

    def make_inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs = torch.randn(tokens, self.columns, device=GPU).bfloat16()
        if self.kind.startswith("fp8"):
            return round_inputs(inputs, "fp8", 128 if self.kind == "fp8-blocks" else 0)
        return round_inputs(inputs, "int8") if self.kind == "int8" else (inputs, None)


def multiply_whole_numbers(
    inputs: torch.Tensor, scales: torch.Tensor, weight: Packed, dtype: torch.dtype
) -> torch.Tensor:
    """By torch's product of int8, which takes more than 16 tokens."""
    sums = torch._int_mm(inputs, weight.values.t())
    return (sums.float() * scales * weight.scales).to(dtype)


scale_whole_numbers = torch.compile(multiply_whole_numbers, dynamic=True)


def list_ways(kind: str, tokens: int) -> dict[str, Callable[..., Any]]:
    """How a product of a format is computed, by name: each takes inputs, their scales and a weight."""
    dtype = torch.bfloat16
    wanted = eight_bits_kernel.Wanted(dtype)
    if kind == "bf16":
        ways: dict[str, Callable[..., Any]] = {"bf16": lambda inputs, _, weight: F.linear(inputs, weight)}
        if tokens <= skinny_gemm.TOKENS:
            ways["bf16 ours"] = lambda inputs, _, weight: skinny_gemm.multiply(inputs, weight, None)
        return ways
    if kind.startswith("humming"):
        return {kind: lambda inputs, _, weight: humming_products.multiply(inputs, weight, None)}
    if kind in ("int4", "mxfp4"):
        ways = {f"{kind} ours": lambda inputs, _, weight: four_bits_kernel.multiply(inputs, weight, None)}
        if tokens >= 64:
            ways[f"{kind} widened"] = lambda inputs, _, weight: products.multiply_widened(inputs, weight, None)
            for size in (24, 64) if kind == "int4" else ():
                ways[f"{kind} widened, {size} MB"] = lambda inputs, _, weight, size=size: products.multiply_widened(
                    inputs, weight, None, size << 20
                )
        return ways
    ways = {
        f"{kind} ours": lambda inputs, scales, weight: eight_bits_kernel.multiply(inputs, scales, weight, None, wanted)
    }
    if kind == "fp8":
        ways["fp8 torch"] = lambda inputs, scales, weight: products.multiply_in_torch(
            inputs, scales, weight, None, dtype
        )
    if kind == "int8" and tokens > 16:
        ways["int8 torch"] = lambda inputs, scales, weight: scale_whole_numbers(inputs, scales, weight, dtype)
    return ways


def measure(calls: Sequence[Call], replays: int = 9) -> float:
    """Microseconds a call; in a process that only compiles, of no meaning."""
    if ONLY_COMPILES:
        calls[0]()
        torch.cuda.synchronize()
        return 0.0
    return graph_timing.measure(calls, replays)


def time_dense(model: str, kinds: Sequence[str]) -> dict[str, dict[tuple[str, int], float]]:
    """Microseconds by way, layer and tokens."""
    found: dict[str, dict[tuple[str, int], float]] = {}
    for layer, (rows, columns) in LAYERS[model].items():
        for kind in kinds:
            try:
                of = Layer(kind, rows, columns)
            except Exception as error:  # a package that is not installed, or fails
                print(f"  {kind}: {type(error).__name__}: {str(error)[:160]}", flush=True)
                continue
            for tokens in TOKENS:
                stored = of.make_inputs(tokens)
                for way, multiply in list_ways(kind, tokens).items():
                    calls = [
                        lambda weight=weight, multiply=multiply, stored=stored: multiply(*stored, weight)
                        for weight in of.weights
                    ]
                    found.setdefault(way, {})[layer, tokens] = attempt(way, lambda calls=calls: measure(calls))
            del of
            torch.cuda.empty_cache()
    return found


def attempt(what: str, action: Callable[[], float]) -> float:
    """What `action` returns; NaN, and the reason in words, if it fails."""
    try:
        return action()
    except Exception as error:
        lines = str(error).strip().splitlines()
        print(f"  {what}: {type(error).__name__}: {lines[0][:160] if lines else ''}", flush=True)
        return float("nan")


def write_table(title: str, found: dict[str, dict[tuple[str, int], float]], names: Sequence[str]) -> None:
    """A line a way and product; the last ones are the sums."""
    print(f"\n{title}, us: " + "".join(f"{tokens:>9}" for tokens in TOKENS))
    for name in (*names, "all"):
        for way, times in found.items():
            figures = []
            for tokens in TOKENS:
                each = [times.get((one, tokens), float("nan")) for one in names]
                figures.append(sum(each) if name == "all" else times.get((name, tokens), float("nan")))
            print(f"  {name:8} {way:22}" + "".join(f"{figure:9.1f}" for figure in figures), flush=True)


def time_experts(model: str, kinds: Sequence[str]) -> dict[str, dict[tuple[str, int], float]]:
    """As `time_dense`, of experts; the tokens of each call choose other ones."""
    found: dict[str, dict[tuple[str, int], float]] = {}
    count, _, shapes = EXPERTS[model]
    for name, (rows, columns) in shapes.items():
        for kind in kinds:
            if kind == "bf16":
                weight: Any = torch.randn(count, rows, columns, device=GPU).bfloat16()
            elif kind == "fp8-blocks" and columns % 128:
                continue
            else:
                weight = make_packed(kind, (count, rows, columns))
            for tokens in TOKENS:
                calls = [make_expert_call(kind, weight, tokens, model, name) for _ in range(8)]
                found.setdefault(kind, {})[name, tokens] = attempt(kind, lambda calls=calls: measure(calls))
            del weight, calls
            torch.cuda.empty_cache()
    return found


def make_expert_call(kind: str, weight: Any, tokens: int, model: str, name: str) -> Call:
    """A product of random pairs."""
    count, top_k, shapes = EXPERTS[model]
    _, index = torch.rand(tokens, count, device=GPU).topk(top_k)
    order, _, offsets = routing.sort_in_torch(index, count)
    by_token = name == "gate_up"
    sorting = Sorting(order, offsets, top_k if by_token else 0)
    inputs = torch.randn(tokens if by_token else tokens * top_k, shapes[name][1], device=GPU).bfloat16()
    if kind == "bf16":
        return lambda: grouped_gemm.multiply(inputs, weight, None, sorting)
    stored: tuple[torch.Tensor, torch.Tensor | None] = inputs, None
    if kind.startswith("fp8"):
        stored = round_inputs(inputs, "fp8", 128 if kind == "fp8-blocks" else 0)
    elif kind == "int8":
        stored = round_inputs(inputs, "int8")
    return lambda: products.multiply_grouped(stored, weight, None, sorting, torch.bfloat16)


def compile_one(work: tuple[str, str, str, int]) -> None:
    """Computes each product of a model once, in a process of its own, so that the main one finds kernels compiled."""
    global ONLY_COMPILES, TOKENS
    mode, model, kind, tokens = work
    ONLY_COMPILES, TOKENS = True, (tokens,)
    time_dense(model, [kind]) if mode == "dense" else time_experts(model, [kind])


def compile_all(mode: str, model: str, kinds: Sequence[str]) -> None:
    """As `compile_one`, of all formats and numbers of tokens, in as many processes as there are cores."""
    parts = [(mode, model, kind, tokens) for kind in kinds if kind != "bf16" for tokens in TOKENS]
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        pool.map(compile_one, parts, chunksize=1)


def list_tiles(kind: str, tokens: int) -> Iterator[Any]:
    """The tiles that are tried for so many tokens: those of tokens, with rows, warps, stages, splits."""
    four = kind in ("int4", "mxfp4")
    for size in (16, 32, 64, 128, 256):
        if not (size >= min(tokens, 128) / 2 and (size <= 16 or size < 2 * tokens)):
            continue
        shapes = {
            16: ((32, 2), (64, 4), (128, 4), (128, 8)),
            32: ((64, 4), (128, 4), (128, 8)),
            64: ((64, 4), (128, 4), (128, 8), (256, 8)),
            128: ((64, 4), (128, 4), (128, 8), (256, 8)),
            256: ((64, 4), (128, 8)),
        }[size]
        programs = (132, 264, 528, 1056) if tokens <= size else (0,)
        for (rows, warps), stages, split in itertools.product(shapes, (2, 3, 4, 6), programs):
            if four:
                if (rows * 128 + size * 512) * stages <= 227 << 10:
                    for scale in (False, True) if size >= 64 else (False,):
                        yield four_bits_kernel.Tile(size, rows, warps, stages, split, scale)
            else:
                for columns in (128, 256) if size <= 32 else (64, 128):
                    if stages > 2 and (rows + size) * columns * stages <= 227 << 10:
                        yield eight_bits_kernel.Tile(size, rows, columns, warps, stages, split)


def call_with_tile(stored: Any, weight: Packed, tile: Any) -> Any:
    if isinstance(tile, four_bits_kernel.Tile):
        return four_bits_kernel.multiply(stored[0], weight, None, None, tile)
    wanted = eight_bits_kernel.Wanted(torch.bfloat16, None, tile)
    return eight_bits_kernel.multiply(*stored, weight, None, wanted)


def compile_tiles(work: tuple[str, tuple[int, int], list[tuple[int, Any]]]) -> None:
    """Calls each of some tiles once, in a process of its own, so that the main one finds them compiled."""
    kind, (rows, columns), tiles = work
    weight = make_packed(kind, (rows, columns))
    layer = Layer.__new__(Layer)
    layer.kind, layer.columns = kind, columns
    for tokens, tile in tiles:
        attempt(
            str(tile),
            lambda tokens=tokens, tile=tile: float(
                bool(call_with_tile(layer.make_inputs(tokens), weight, tile) is None)
            ),
        )
    torch.cuda.synchronize()


def search_tiles(model: str, kinds: Sequence[str]) -> None:
    """The best tiles for each format and number of tokens, by the sum over the layers of a model, and by layer."""
    started = time.perf_counter()
    shape = next(iter(LAYERS[model].values()))
    wanted = [(kind, [(tokens, tile) for tokens in TOKENS for tile in list_tiles(kind, tokens)]) for kind in kinds]
    workers = min(16, os.cpu_count() or 1)
    parts = []
    for kind, tiles in wanted:
        alike = sorted({tile._replace(programs=0) for _, tile in tiles})  # the kernel is the same, however it is split
        for at in range(workers):
            own = set(alike[at::workers])
            parts.append((kind, shape, [pair for pair in tiles if pair[1]._replace(programs=0) in own]))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(compile_tiles, parts, chunksize=1)
    print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)
    for kind, tiles in wanted:
        times: dict[int, dict[Any, dict[str, float]]] = {}
        for layer, (rows, columns) in LAYERS[model].items():
            of = Layer(kind, rows, columns)
            for tokens, tile in tiles:
                stored = of.make_inputs(tokens)
                calls = [
                    lambda weight=weight, stored=stored, tile=tile: call_with_tile(stored, weight, tile)
                    for weight in of.weights
                ]
                took = attempt(str(tile), lambda calls=calls: measure(calls, 3))
                times.setdefault(tokens, {}).setdefault(tile, {})[layer] = took
            del of
            torch.cuda.empty_cache()
        for tokens, of_tiles in times.items():
            print(f"{kind} {tokens} tokens ({time.perf_counter() - started:.0f} s)")
            right = {tile: each for tile, each in of_tiles.items() if all(figure == figure for figure in each.values())}
            for tile, each in sorted(right.items(), key=lambda pair: sum(pair[1].values()))[:4]:
                print(f"  {sum(each.values()):8.1f} us  {tuple(tile)}  " + _describe(each))
            for layer in LAYERS[model]:
                best = min(right, key=lambda tile: right[tile][layer])
                print(f"    {layer}: {right[best][layer]:.1f} {tuple(best)}", flush=True)


def _describe(times: dict[str, float]) -> str:
    return " ".join(f"{name} {figure:.1f}" for name, figure in times.items())


def main() -> None:
    words = sys.argv[1:]
    modes = [word for word in words if word in ("dense", "experts", "tiles")] or ["dense", "experts"]
    models = [word for word in words if word in LAYERS or word in EXPERTS]
    kinds = os.environ.get("WAYS", "bf16,fp8,fp8-blocks,int8,int4,mxfp4").split(",")
    started = time.perf_counter()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    programs.prepare(torch.device(GPU, torch.cuda.current_device()))
    for mode in modes:
        for model in models or (EXPERTS if mode == "experts" else LAYERS):
            if mode == "tiles" and model in LAYERS:
                search_tiles(model, [kind for kind in kinds if kind != "bf16"])
            elif mode == "dense" and model in LAYERS:
                compile_all(mode, model, kinds)
                print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)
                write_table(f"{model} (a layer)", time_dense(model, kinds), list(LAYERS[model]))
            elif mode == "experts" and model in EXPERTS:
                compile_all(mode, model, kinds)
                print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)
                write_table(f"{model} (experts)", time_experts(model, kinds), list(EXPERTS[model].products))
            print(f"after {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
