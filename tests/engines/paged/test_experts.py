"""Mixtures of experts beside their definition, and beside Transformers' own in tiny models of the families."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from batchgen.engines.paged import experts
from batchgen.engines.paged.experts import grouped_gemm, routing
from batchgen.engines.paged.experts.combining import combine
from batchgen.engines.paged.experts.interface import compute_experts
from batchgen.engines.paged.not_covered import NotCovered
from tests.engines.paged.expert_cases import CASES, LAYOUTS, TOLERANCES, Case, expect, make_experts, route
from tests.kernels import assert_none_wrong
from tests.sweep.kinds import build

FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "phimoe",
    "gpt_oss",
    "deepseek_v2",
    "glm4_moe",
    "ernie4_5_moe",
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pairs_are_sorted_by_expert_and_token(case: Case) -> None:
    index, _ = route(case)
    order, inverse, offsets = routing.sort_by_expert(index, case.experts)
    numbers = index.flatten().clamp(max=case.experts).tolist()
    assert order.tolist() == sorted(range(len(numbers)), key=lambda pair: (numbers[pair], pair))
    assert [order[place] for place in inverse] == list(range(len(numbers)))
    counts = [numbers.count(expert) for expert in range(case.experts)]
    assert offsets.tolist() == [sum(counts[:expert]) for expert in range(case.experts + 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_are_as_by_definition(case: Case, layout: str) -> None:
    module = make_experts(layout, case)
    index, weights = route(case)
    hidden = torch.randn(case.tokens, case.width, generator=torch.Generator().manual_seed(2))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rounded, inputs = copy.deepcopy(module).to(dtype), hidden.to(dtype)
        out = compute_experts(rounded, inputs, index, weights)
        expected = expect(rounded, inputs, index, weights)  # of the rounded weights: it makes them wider
        assert out.dtype == dtype
        assert (out - expected).norm() <= TOLERANCES[dtype] * expected.norm()


def test_what_pairs_of_no_expert_hold_is_not_read() -> None:
    outputs = torch.tensor([[1.0, 2.0], [3.0, 4.0], [torch.nan, torch.inf], [torch.nan, torch.nan]])
    places, weights = torch.tensor([[1, 2], [3, 0]], dtype=torch.int32), torch.tensor([[0.5, 1.0], [1.0, 2.0]])
    out = combine(outputs, places, weights, torch.tensor([[0, 4], [5, 3]]), 4)
    assert out.tolist() == [[1.5, 2.0], [2.0, 4.0]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_broken_token_stays_alone(layout: str) -> None:
    case = Case(33, 8, 8)  # every expert has it among its tokens
    module, (index, weights) = make_experts(layout, case), route(case)
    hidden = torch.randn(case.tokens, case.width, generator=torch.Generator().manual_seed(2))
    expected = compute_experts(module, hidden, index, weights)
    hidden[7] = torch.nan
    out = compute_experts(module, hidden, index, weights)
    others = torch.arange(case.tokens) != 7
    assert out[7].isnan().all()
    torch.testing.assert_close(out[others], expected[others])


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no product of groups for a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [case for case in CASES if case.tokens], ids=str)
def test_products_by_torch_are_those_of_the_loop(case: Case, dtype: torch.dtype) -> None:
    index, _ = route(case)
    order, _, offsets = routing.sort_by_expert(index, case.experts)
    source = torch.Generator().manual_seed(3)
    weight = torch.randn(case.experts, 16, case.width, generator=source).to(dtype)
    bias = torch.randn(case.experts, 16, generator=source).to(dtype)
    inputs = torch.randn(case.tokens, case.width, generator=source).to(dtype)
    sorting = grouped_gemm.Sorting(order, offsets, case.top_k)
    for some_bias in (None, bias):
        out = grouped_gemm.multiply_in_torch(inputs, weight, some_bias, sorting)[: offsets[-1]].double()
        exact = inputs.double(), weight.double(), None if some_bias is None else some_bias.double()
        expected = grouped_gemm.multiply_in_loop(*exact, sorting)[: offsets[-1]]
        assert (out - expected).norm() <= TOLERANCES[dtype] * expected.norm()


def test_operators_say_their_shapes_to_the_compiler() -> None:
    case = Case(7, 2, 8)
    index, _ = route(case)
    order, _, offsets = routing.sort_by_expert(index, case.experts)
    weight, inputs = torch.randn(8, 20, 24), torch.randn(7, 24)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.batchgen.sort_by_expert, (index, 8), test_utils=checks)
    for given in (weight, weight.transpose(1, 2).contiguous().transpose(1, 2)):
        arguments = (inputs, given, torch.randn(8, 20), order, offsets, 2)
        torch.library.opcheck(torch.ops.batchgen.grouped_product, arguments, test_utils=checks)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_computes_the_same_and_compiles_whole(kind: str) -> None:
    model = build(kind)
    model.set_experts_implementation("eager")
    # Longer than their windows: Transformers' attention has another graph without a mask.
    texts = [torch.randint(4, 128, (1, length), generator=torch.Generator().manual_seed(4)) for length in (20, 33)]
    with torch.inference_mode():
        expected = [model(text, use_cache=False).logits for text in texts]
        modules = experts.install(model)
        assert modules > 0
        for text, logits in zip(texts, expected, strict=True):
            torch.testing.assert_close(model(text, use_cache=False).logits, logits, rtol=1e-5, atol=1e-5)
        torch.compiler.reset()  # the families share a forward, whose graphs are counted
        counter = CompileCounter()
        for layer in model.get_decoder().layers:
            layer.compile(backend=counter, fullgraph=True, dynamic=True)
        graphs = []
        for text, logits in zip(texts, expected, strict=True):
            torch.testing.assert_close(model(text, use_cache=False).logits, logits, rtol=1e-5, atol=1e-5)
            graphs.append(counter.frame_count)
    assert 0 < graphs[0] == graphs[-1]  # those of the first length serve the others


def test_experts_of_unknown_kind_are_refused() -> None:
    model = build("mixtral")
    for module in model.modules():
        if hasattr(module, "_apply_gate"):
            module.has_post_expert_norm = True  # as Transformers says of Muse Spark
    with pytest.raises(NotCovered, match=r"its experts \(MixtralExperts\) say has_post_expert_norm"):
        experts.install(model)


def test_a_dense_model_has_no_experts() -> None:
    assert experts.install(build("llama")) == 0


@pytest.mark.slow
def test_kernels_compute_the_same() -> None:
    """Interpreted, where there is no GPU. Triton is not in the environment: what finds it takes it for a GPU's."""
    assert_none_wrong("tests.engines.paged.expert_cases")
