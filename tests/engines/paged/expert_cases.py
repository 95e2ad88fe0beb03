"""Routings and modules of experts, what comes out of them by definition, and the kernels beside it.

`python -m tests.engines.paged.expert_cases [cuda]` runs the kernels: on a GPU, or, where Triton is told to interpret
them, on the CPU. Outputs are poisoned before they are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from tests.engines.paged.attention_cases import poisoned
from tests.kernels import say_cases

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    tokens: int
    top_k: int
    experts: int
    width: int = 24
    inner: int = 20
    routing: str = "uniform"


CASES = (
    Case(1, 1, 4),
    Case(1, 4, 128),  # most have no pair
    Case(7, 2, 8),
    Case(300, 8, 128),
    Case(33, 8, 8),  # each token has all of them
    Case(64, 2, 16, routing="one"),  # the first choice of all tokens is the same
    Case(50, 3, 16, routing="few"),  # the first and the last experts have none
    Case(40, 4, 12, routing="others"),  # some are those of other ranks
    Case(0, 2, 4),
)


def route(case: Case, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token, no two the same, and their weights, [tokens, K] each."""
    source = torch.Generator().manual_seed(seed)
    scores = torch.rand(case.tokens, case.experts, generator=source)
    if case.routing == "one":
        scores[:, case.experts // 2] = 2
    if case.routing == "few":
        scores[:, 5:-5] += 1
    weights, index = scores.topk(case.top_k)
    if case.routing == "others":
        index = torch.where(index % 3 == 1, case.experts + index, index)
    return index, weights


def _mixtral(case: Case) -> Any:
    sizes = {"hidden_size": case.width, "intermediate_size": case.inner, "num_local_experts": case.experts}
    return MixtralExperts(MixtralConfig(**sizes))


def _gpt_oss(case: Case) -> Any:
    sizes = {"hidden_size": case.width, "intermediate_size": case.inner, "num_local_experts": case.experts}
    return GptOssExperts(GptOssConfig(**sizes))


def _nemotron(case: Case) -> Any:
    sizes = {"hidden_size": case.width, "moe_intermediate_size": case.inner, "n_routed_experts": case.experts}
    return NemotronHExperts(NemotronHConfig(**sizes))


# Plain; transposed, interleaved and with biases; without a gate.
LAYOUTS = {"mixtral": _mixtral, "gpt_oss": _gpt_oss, "nemotron_h": _nemotron}


def make_experts(layout: str, case: Case) -> Any:
    """A family's own module of experts, with random weights."""
    torch.manual_seed(1)
    module = LAYOUTS[layout](case)
    with torch.no_grad():
        for weights in module.parameters():
            weights.normal_(0, 0.3)
    return module.requires_grad_(False)


def expect(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The definition: pair by pair, in float64. [tokens, width]"""
    module, name = module.double(), "gate_up_proj" if module.has_gate else "up_proj"
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, (experts, shares) in enumerate(zip(index.tolist(), weights.tolist(), strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            if expert < len(module.down_proj):
                inner = _multiply_one(module, name, expert, hidden[token].double())
                inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
                out[token] += share * _multiply_one(module, "down_proj", expert, inner)
    return out


def _multiply_one(module: Any, name: str, expert: int, vector: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)[expert]
    product = vector @ weight if module.is_transposed else weight @ vector
    return product + getattr(module, f"{name}_bias")[expert] if module.has_bias else product


def sorts(device: str) -> Iterator[tuple[str, bool]]:
    """Each case of the sorting kernel in words, and whether it is right."""
    from batchgen.engines.paged.experts import routing, routing_kernel

    for case in (*CASES, Case(1100, 4, 8), Case(513, 2, 3)):
        index, _ = route(case)
        with poisoned():
            found = [one.cpu() for one in routing_kernel.sort_by_expert(index.to(device), case.experts)]
        right = all(map(torch.equal, found, routing.sort_in_torch(index, case.experts)))
        yield f"sorting {case}", right


def products(device: str) -> Iterator[tuple[str, bool]]:
    """As `sorts`, of the products: each beside the loop in float64, in two layouts, with and without biases."""
    from batchgen.engines.paged.experts import grouped_gemm, grouped_gemm_kernel, routing
    from batchgen.engines.paged.experts.grouped_gemm_kernel import Tile

    # The interpreter takes seconds for large cases.
    cases, small = [*CASES, Case(70, 2, 4, 64, 40), Case(9, 2, 4, 56, 40)], Tile(16, 32, 32, 4, 3)
    tiles: dict[torch.dtype, Sequence[Tile | None]] = {torch.float32: (None,), torch.float16: (small,)}
    if device == "cuda":
        cases += [Case(600, 8, 128, 2048, 768), Case(64, 4, 32, 2880, 720), Case(3000, 2, 8, 1000, 1408)]
        every = (None, small, *(tile for _, tile in grouped_gemm_kernel.TILES), grouped_gemm_kernel.LARGEST)
        tiles = {torch.float32: (None, small), torch.float16: every, torch.bfloat16: every}
    for number, case in enumerate(cases):
        index, _ = route(case)
        order, _, offsets = routing.sort_in_torch(index, case.experts)
        end = int(offsets[-1])
        for dtype in tiles:
            for tile in tiles[dtype]:
                source = torch.Generator().manual_seed(number)
                by_token = number % 2 == 0
                sorting = grouped_gemm.Sorting(order, offsets, case.top_k if by_token else 0)
                rows = case.tokens if by_token else len(order)
                # Wider than it is used, as part of a larger tensor.
                inputs = torch.randn(rows, case.width + 8, generator=source).to(dtype)[:, : case.width]
                inputs[3:4] = torch.nan  # reaches its own pairs alone
                weight = torch.randn(case.experts, case.inner, case.width, generator=source).to(dtype)
                if number % 3 == 0:
                    weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
                bias = torch.randn(case.experts, case.inner, generator=source).to(dtype) if number % 4 < 2 else None
                exact = (inputs.double(), weight.double(), None if bias is None else bias.double())
                expected = grouped_gemm.multiply_in_loop(*exact, sorting)[:end]
                on_device = inputs.to(device), weight.to(device), None if bias is None else bias.to(device)
                with poisoned():
                    moved = sorting._replace(order=order.to(device), offsets=offsets.to(device))
                    out = grouped_gemm_kernel.multiply(*on_device, moved, tile).cpu().double()[:end]
                alike = torch.equal(out.isnan(), expected.isnan())
                error = float((out - expected).nan_to_num().norm() / expected.nan_to_num().norm().clamp(min=1e-30))
                what = f"{dtype} {case} {tile} by token={by_token} bias={bias is not None}"
                yield f"{what}: {error:.1e}", alike and error < TOLERANCES[dtype]


def sums(device: str) -> Iterator[tuple[str, bool]]:
    """As `sorts`, of the sums of each token's outputs; what belongs to no expert is NaN."""
    from batchgen.engines.paged.experts import combining_kernel
    from batchgen.engines.paged.experts.combining import combine_in_torch
    from batchgen.engines.paged.experts.routing import sort_in_torch

    widths = (24, 2048, 2880) if device == "cuda" else (24,)
    for case in (case._replace(width=width) for case in CASES for width in widths):
        index, weights = route(case)
        _, inverse, offsets = sort_in_torch(index, case.experts)
        outputs = torch.randn(index.numel(), case.width, generator=torch.Generator().manual_seed(1))
        outputs[offsets[-1] :] = torch.nan
        arguments = [inverse.view_as(index), weights, index]
        expected = combine_in_torch(outputs.double(), *arguments, case.experts)
        with poisoned():
            out = combining_kernel.combine(outputs.to(device), *(each.to(device) for each in arguments), case.experts)
        error = ((out.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-9)).item()
        yield f"{case}: {error:.1e}", error < TOLERANCES[torch.float32]


def layers(device: str) -> Iterator[tuple[str, bool]]:
    """As `sorts`, of whole layers on a GPU: each in a CUDA graph that is replayed with other experts and inputs."""
    from batchgen.engines.paged.experts import grouped_gemm
    from batchgen.engines.paged.experts.interface import compute_experts

    many = grouped_gemm.MANY_PAIRS * 4
    cases = [Case(5, 2, 8, 64, 48), Case(40, 4, 12, 64, 48, "others"), Case(many, 2, 4, 64, 48)]
    for layout in LAYOUTS if device == "cuda" else ():
        for case in cases:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                module = make_experts(layout, case).to(device, dtype)
                steps = []
                for seed in (5, 6):
                    hidden = torch.randn(case.tokens, case.width, generator=torch.Generator().manual_seed(seed))
                    steps.append([one.to(device) for one in (hidden.to(dtype), *route(case, seed))])
                given, graph = [one.clone() for one in steps[0]], torch.cuda.CUDAGraph()
                compute_experts(module, *given)  # compiles the kernels
                with torch.cuda.graph(graph):
                    out = compute_experts(module, *given)
                for target, source in zip(given, steps[1], strict=True):
                    target.copy_(source)
                graph.replay()
                expected = expect(module.cpu(), *(one.cpu() for one in steps[1]))
                error = float((out.cpu() - expected).norm() / expected.norm())
                yield f"{layout} {dtype} {case}: {error:.1e}", error < TOLERANCES[dtype]


if __name__ == "__main__":
    say_cases(sorts, products, sums, layers)
