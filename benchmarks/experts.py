"""A layer of experts on one GPU, in bfloat16: `python benchmarks/experts.py [check|layers|parts|tiles] [MODEL…]`.

`check` compares with float32, also what a CUDA graph gives when it is replayed with other experts; `layers` times whole
layers, compiled: ours, and with torch's product of groups in place of our kernel for any number of pairs; `parts` times
sorting and each product; `tiles` times the kernel by tile, the three best of each product. Without a word, the first
three. MODEL is one of `MODELS`, TOKENS=1,64 changes the rows.

Routing is uniform, and as many calls as are timed together have each its own, in one CUDA graph: the experts of one
call are not in the cache for the next. GB/s are of the weights of the experts that have a pair, read once; TFLOP/s of
the pairs' products. Medians of nine replays.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from graph_timing import capture, measure
from transformers import DeepseekV2Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from batchgen.engines.paged.experts import grouped_gemm, grouped_gemm_kernel, routing
from batchgen.engines.paged.experts.grouped_gemm import Sorting
from batchgen.engines.paged.experts.grouped_gemm_kernel import Tile
from batchgen.engines.paged.experts.interface import compute_experts

TOKENS = tuple(map(int, os.environ.get("TOKENS", "1,8,64,128,256,512,1024,2048,8192").split(",")))
DEVICE = "cuda"
ROUTINGS = 8  # calls in a graph, each with its own


class Model(NamedTuple):
    experts: int
    top_k: int
    width: int
    inner: int
    module: Any  # the family's own class
    config: Any
    names: tuple[str, str]  # of `experts` and `inner` in its config


MODELS = {
    "qwen3-30b-a3b": Model(
        128, 8, 2048, 768, Qwen3MoeExperts, Qwen3MoeConfig, ("num_experts", "moe_intermediate_size")
    ),
    "mixtral-8x7b": Model(8, 2, 4096, 14336, MixtralExperts, MixtralConfig, ("num_local_experts", "intermediate_size")),
    "gpt-oss-20b": Model(32, 4, 2880, 2880, GptOssExperts, GptOssConfig, ("num_local_experts", "intermediate_size")),
    "deepseek-v2-lite": Model(
        64, 6, 2048, 1408, DeepseekV2Experts, DeepseekV2Config, ("n_routed_experts", "moe_intermediate_size")
    ),
}


class Routing(NamedTuple):
    index: torch.Tensor  # [tokens, K]
    weights: torch.Tensor  # [tokens, K], bfloat16


def make_module(model: Model) -> Any:
    """The family's own module, with random weights of about the size that keeps its outputs near 1."""
    torch.manual_seed(0)
    config = model.config(hidden_size=model.width, **dict(zip(model.names, (model.experts, model.inner), strict=True)))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        module = model.module(config).requires_grad_(False)
    torch.set_default_dtype(before)
    for name, weights in module.named_parameters():
        weights.normal_(0, 0.5 if name.endswith("bias") else model.width**-0.5)
    return module


def make_routing(model: Model, tokens: int, seed: int) -> Routing:
    """Random experts for each token, all equally likely, no two of a token the same."""
    source = torch.Generator(DEVICE).manual_seed(seed)
    scores, index = torch.rand(tokens, model.experts, device=DEVICE, generator=source).topk(model.top_k)
    of = Routing(index, (scores / scores.sum(1, keepdim=True)).bfloat16())
    for tensor in of:
        torch._dynamo.mark_static(tensor, 1)  # as in a model, whose K is a number to the compiler
    return of


def make_hidden(model: Model, tokens: int) -> torch.Tensor:
    hidden = torch.randn(tokens, model.width, device=DEVICE).bfloat16()
    torch._dynamo.mark_static(hidden, 1)
    return hidden


def compute_in_float32(module: Any, hidden: torch.Tensor, of: Routing) -> torch.Tensor:
    """The definition, expert by expert. [tokens, width]"""
    out = torch.zeros(hidden.shape, device=DEVICE)
    for expert in range(len(module.down_proj)):
        token, choice = (of.index == expert).nonzero(as_tuple=True)
        rows = hidden[token].float()
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(module, name)[expert].float()
            rows = rows @ (weight if module.is_transposed else weight.T)
            rows += getattr(module, f"{name}_bias")[expert].float() if module.has_bias else 0
            rows = module._apply_gate(rows) if name == "gate_up_proj" else rows
        out.index_add_(0, token, rows * of.weights[token, choice, None].float())
    return out


def compile_layer(module: Any) -> Callable[..., torch.Tensor]:
    """As the engine compiles layers."""

    def compute(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return compute_experts(module, hidden, index, weights)

    return torch.compile(compute, fullgraph=True, dynamic=True)


def check(name: str, module: Any) -> None:
    """The relative error beside float32, by number of tokens; and that of a graph replayed with other experts."""
    model, compute = MODELS[name], compile_layer(module)
    for tokens in (1, 3, 8, 64, 200, 512, 2048, 8192):
        hidden = make_hidden(model, tokens)
        of, other = (make_routing(model, tokens, seed) for seed in (1, 2))
        expected = [compute_in_float32(module, hidden, one) for one in (of, other)]
        outputs = [compute(hidden, *of)]
        results: list[torch.Tensor] = []
        graph = capture([lambda results=results, of=of, hidden=hidden: results.append(compute(hidden, *of))])  # type: ignore[misc]
        for target, source in zip(of, other, strict=True):
            target.copy_(source)
        graph.replay()
        outputs.append(results[-1])
        errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(outputs, expected, strict=True)]
        verdict = "" if max(errors) < 1e-2 else "  WRONG"
        print(f"{name}, {tokens} tokens: error {errors[0]:.1e}, replayed {errors[1]:.1e}{verdict}", flush=True)


def count_bytes(model: Model, routings: Sequence[Routing]) -> float:
    """Of the weights of the experts that have a pair, both products, on average."""
    hit = statistics.mean(len(of.index.unique()) for of in routings)
    return hit * 3 * model.width * model.inner * 2


def time_layers(name: str, module: Any) -> None:
    """Prints a line for each number of tokens."""
    model, compute = MODELS[name], compile_layer(module)
    before = grouped_gemm.MANY_PAIRS
    print(f"\n{name}, a layer\n| tokens | ours, us | GB/s | TFLOP/s | all by torch, us | all by our kernel, us |")
    print("|--:|--:|--:|--:|--:|--:|")
    for tokens in TOKENS:
        hidden = make_hidden(model, tokens)
        routings = [make_routing(model, tokens, seed) for seed in range(ROUTINGS)]
        calls = [lambda of=of, hidden=hidden: compute(hidden, *of) for of in routings]
        times = []
        for threshold in (before, 0, 1 << 40):
            grouped_gemm.MANY_PAIRS = threshold
            times.append(measure(calls))
        grouped_gemm.MANY_PAIRS = before
        speed = count_bytes(model, routings) / times[0] / 1000
        products = tokens * model.top_k * 6 * model.width * model.inner / times[0] / 1e6
        print(
            f"| {tokens} | {times[0]:.1f} | {speed:.0f} | {products:.0f} | {times[1]:.1f} | {times[2]:.1f} |",
            flush=True,
        )


class Products(NamedTuple):
    """The two products of a layer, for each of some routings."""

    sortings: list[Sorting]
    hidden: torch.Tensor
    inner: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    module: Any

    def call(self, multiply: Callable[..., Any], first: bool) -> list[Callable[[], Any]]:
        """A call of `multiply` for each routing, of the first product of a layer or the second."""
        name = "gate_up_proj_bias" if first else "down_proj_bias"
        bias = getattr(self.module, name) if self.module.has_bias else None
        inputs, weight = (self.hidden, self.up) if first else (self.inner, self.down)
        sortings = self.sortings if first else [of._replace(top_k=0) for of in self.sortings]
        return [lambda of=of: multiply(inputs, weight, bias, of) for of in sortings]  # type: ignore[misc]


def make_products(model: Model, module: Any, tokens: int) -> Products:
    indexes = [make_routing(model, tokens, seed).index for seed in range(ROUTINGS)]
    sortings = []
    for index in indexes:
        order, _, offsets = routing.sort_by_expert(index, model.experts)
        sortings.append(Sorting(order, offsets, model.top_k))
    inner = torch.randn(tokens * model.top_k, model.inner, device=DEVICE).bfloat16()
    up, down = (
        weight.transpose(1, 2) if module.is_transposed else weight for weight in (module.gate_up_proj, module.down_proj)
    )
    return Products(sortings, make_hidden(model, tokens), inner, up, down, module)


def time_parts(name: str, module: Any) -> None:
    """Prints a line for each number of tokens."""
    model = MODELS[name]
    print(f"\n{name}, parts, us\n| tokens | sorting | first: kernel | torch | second: kernel | torch |")
    print("|--:|--:|--:|--:|--:|--:|")
    for tokens in TOKENS:
        indexes = [make_routing(model, tokens, seed).index for seed in range(ROUTINGS)]
        times = [measure([lambda index=index: routing.sort_by_expert(index, model.experts) for index in indexes])]  # type: ignore[misc]
        products = make_products(model, module, tokens)
        ways = (grouped_gemm_kernel.multiply, grouped_gemm.multiply_in_torch)
        times += [measure(products.call(multiply, first)) for first in (True, False) for multiply in ways]
        print(f"| {tokens} | {' | '.join(f'{one:.1f}' for one in times)} |", flush=True)


def list_tiles(pairs: int, experts: int) -> Iterator[Tile]:
    """Those that may be good for so many pairs of so many experts."""
    sizes = [size for size in (16, 32, 64, 128) if pairs / experts / 2 <= size <= max(32, 6 * pairs / experts)] or [128]
    for size in sizes:
        for columns in {16: (32, 64, 128), 32: (32, 64, 128), 64: (64, 128), 128: (128, 256)}[size]:
            for depth in (64, 128) if size + columns < 256 else (64,):
                for warps in (4, 8):
                    for stages in (3, 4, 5):
                        if (size + columns) * depth * 2 * stages <= 220_000:  # bytes of shared memory
                            yield Tile(size, columns, depth, warps, stages)


def time_tiles(name: str, module: Any) -> None:
    """Prints the best tiles of each product for each number of tokens, beside the one that is chosen."""
    model = MODELS[name]
    for tokens in TOKENS:
        products = make_products(model, module, tokens)
        chosen = grouped_gemm_kernel.choose_tile(tokens * model.top_k, model.experts, torch.bfloat16)
        for first in (True, False):
            times = {}
            for tile in {chosen, *list_tiles(tokens * model.top_k, model.experts)}:

                def multiply(*arguments: Any, tile: Tile = tile) -> torch.Tensor:
                    return grouped_gemm_kernel.multiply(*arguments, tile=tile)

                try:
                    times[tile] = measure(products.call(multiply, first))
                except Exception as error:  # a tile that this GPU has no room for
                    print(f"{tuple(tile)}: {type(error).__name__}", flush=True)
            best = sorted(times, key=times.__getitem__)[:3]
            shown = ", ".join(f"{tuple(tile)} {times[tile]:.1f}" for tile in (chosen, *best) if tile in times)
            which = "first" if first else "second"
            print(f"{name}, {tokens} tokens, {which}, us: chosen and best: {shown}", flush=True)


JOBS = {"check": check, "layers": time_layers, "parts": time_parts, "tiles": time_tiles}


def main(*words: str) -> None:
    """Does each job that is named for each model that is named."""
    jobs = [word for word in words if word in JOBS] or ["check", "layers", "parts"]
    for name in [word for word in words if word in MODELS] or MODELS:
        module = make_module(MODELS[name])
        with torch.inference_mode():
            for job in jobs:
                JOBS[job](name, module)
        torch.compiler.reset()  # or the graphs of the models before would count against its limit


if __name__ == "__main__":
    main(*sys.argv[1:])
