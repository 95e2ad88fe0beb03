"""Quantised weights in patched models, and their operators, beside the float reference of `QuantisedWeight`."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers.pytorch_utils import Conv1D

from batchgen.engines.paged.adapters import LayerAdapters, set_adapters
from batchgen.engines.paged.alone import Alone
from batchgen.engines.paged.layout import use_adapter
from batchgen.engines.paged.models import patch
from batchgen.engines.paged.quantised.held import HeldWeight
from batchgen.engines.paged.quantised.packing import BLOCK, PART, covers, pack_for_kernels
from batchgen.engines.paged.quantised.rounding import round_inputs, widen_inputs
from batchgen.models.quantised.places import get_quantised, set_quantised, widen_all
from batchgen.models.quantised.weight import Kind, QuantisedWeight
from tests.engines.paged.quantised_cases import SCHEMES, Scheme, expect, find_error, make_weight
from tests.kernels import assert_none_wrong
from tests.sweep.kinds import build

FAMILIES = ("llama", "bloom", "falcon", "gemma2", "gpt2", "mixtral", "gpt_oss", "nemotron_h")


def quantise(weight: torch.Tensor, kind: Kind = "int4") -> QuantisedWeight:
    """A scale a row; plainly rounded."""
    most = {"int4": 7, "int8": 127, "fp8": 448}[kind]
    scales = weight.abs().amax(-1, keepdim=True) / most
    numbers = weight / scales
    if kind == "fp8":
        return QuantisedWeight("fp8", numbers.to(torch.float8_e4m3fn), scales, inputs="fp8")
    if kind == "int8":
        return QuantisedWeight("int8", numbers.round().to(torch.int8), scales, inputs="int8")
    nibbles = (numbers.round() + 8).to(torch.uint8)
    return QuantisedWeight("int4", nibbles[..., 0::2] | nibbles[..., 1::2] << 4, scales)


def quantise_model(model: nn.Module, kind: Kind) -> nn.Module:
    """Quantises the linear layers and the experts of a model, but for its head and routers."""
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "FalconLinear") and "lm_head" not in name:
            set_quantised(module, "weight", quantise(module.weight.data, kind))
        elif isinstance(module, Conv1D):
            set_quantised(module, "weight", quantise(module.weight.data.T.contiguous(), kind))
        elif hasattr(module, "_apply_gate") and kind == "int4":
            for of in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
                weight = getattr(module, of).data
                turned = weight.transpose(1, 2) if getattr(module, "is_transposed", False) else weight
                set_quantised(module, of, quantise(turned.contiguous(), kind))
    return model


class Reference(nn.Module):
    """A linear layer by definition."""

    def __init__(self, layer: nn.Linear, weight: QuantisedWeight) -> None:
        super().__init__()
        self.given, self.weight, self.bias = weight, layer.weight, layer.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = self.given.round_inputs(inputs.reshape(-1, inputs.shape[-1]))
        return F.linear(rows, self.given.widen(), self.bias).view(*inputs.shape[:-1], -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_model_of_4_bits_computes_what_its_weights_stand_for(family: str) -> None:
    model = quantise_model(build(family), "int4")
    wide = copy.deepcopy(model)
    widen_all(wide)
    ids, positions = torch.randint(4, 128, (9,), generator=torch.Generator().manual_seed(4)), torch.arange(9)
    with torch.inference_mode():
        hidden = patch(model, Alone()).compute_hidden(ids, positions)
        expected = patch(wide, Alone()).compute_hidden(ids, positions)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    assert any(isinstance(module, HeldWeight) for module in model.modules())


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_inputs_are_rounded_as_the_weights_ask(kind: Kind) -> None:
    model = quantise_model(build("llama"), kind)
    by_definition = copy.deepcopy(model)
    for module in list(by_definition.modules()):
        for name, layer in list(module.named_children()):
            weight = get_quantised(layer)
            if isinstance(layer, nn.Linear) and weight is not None:
                setattr(module, name, Reference(layer, weight))
    ids, positions = torch.randint(4, 128, (9,), generator=torch.Generator().manual_seed(4)), torch.arange(9)
    with torch.inference_mode():
        hidden = patch(model, Alone()).compute_hidden(ids, positions)
        expected = patch(by_definition, Alone()).compute_hidden(ids, positions)
    assert find_error(hidden, expected.double()) < 2e-3  # a number at the border of two goes either way
    assert not any(get_quantised(module) for module in model.modules())


def test_a_layer_is_one_graph_and_serves_all_layers_and_lengths() -> None:
    torch.compiler.reset()
    for kind in ("int4", "fp8"):
        patched = patch(quantise_model(build("llama"), kind), Alone())  # type: ignore[arg-type]
        counter = CompileCounter()
        for layer in patched.layers:
            layer.compile(backend=counter, fullgraph=True, dynamic=True)
        graphs = []
        with torch.inference_mode():
            for length in (20, 33, 7):
                patched.compute_hidden(torch.arange(4, 4 + length), torch.arange(length))
                graphs.append(counter.frame_count)
        assert 0 < graphs[0] == graphs[-1]


class Scaled(nn.Linear):
    """Computes more than a product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_what_has_no_product_of_its_own_is_widened() -> None:
    model = build("llama")
    model.get_decoder().layers[0].mlp.down_proj.__class__ = Scaled
    for module in (model.get_decoder().layers[0].mlp.down_proj, model.get_input_embeddings()):
        set_quantised(module, "weight", quantise(module.weight.data))
    wide = copy.deepcopy(model)
    widen_all(wide)
    ids, positions = torch.arange(4, 13), torch.arange(9)
    with torch.inference_mode():
        hidden = patch(model, Alone()).compute_hidden(ids, positions)
        expected = patch(wide, Alone()).compute_hidden(ids, positions)
    torch.testing.assert_close(hidden, expected)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rounded_inputs_are_those_of_the_reference(scheme: Scheme) -> None:
    inputs = (
        torch.randn(5, 256, generator=torch.Generator().manual_seed(1)) * torch.tensor([1, 0, 1e-3, 50, 4])[:, None]
    )
    weight = make_weight(scheme, 8, 256, 0)
    stored, scales = inputs, None
    if scheme.inputs:
        stored, scales = round_inputs(inputs, scheme.inputs, scheme.inputs_group)
    torch.testing.assert_close(widen_inputs(stored, scales), weight.round_inputs(inputs), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.kind in ("int4", "mxfp4")], ids=str)
def test_words_hold_the_parts_of_a_block(scheme: Scheme) -> None:
    weight = make_weight(scheme, 6, 384, 0)
    assert covers(weight)
    packed = pack_for_kernels(weight)
    for row, column in ((0, 0), (5, 1), (3, 255), (2, 256), (1, 383)):
        block, within = divmod(column, BLOCK)
        word = int(packed.values[block, row, within % PART])
        byte = int(weight.values[row, column // 2])
        assert word >> 4 * (within // PART) & 15 == byte >> 4 * (column % 2) & 15
        if scheme.kind == "mxfp4":
            exponents = int(packed.scales[column // (BLOCK // 2), row])
            assert exponents >> 8 * (column // PART % 4) & 255 == int(
                weight.scales.view(torch.uint8)[row, column // 32]
            )
    assert packed.values.shape == (2, 6, PART)


def test_weights_that_kernels_cannot_scale_are_not_covered() -> None:
    weight = make_weight(Scheme("mxfp4", 32, scales=torch.float8_e8m0fnu), 6, 64, 0)
    assert covers(weight)
    weight.scales.view(torch.uint8)[3, 1] = 129
    assert not covers(weight)
    assert not covers(make_weight(Scheme("int4", 16), 6, 64, 0))


def test_a_scale_of_inputs_that_is_fixed_is_used() -> None:
    weight = replace(make_weight(Scheme("fp8", inputs="fp8"), 24, 64, 0), inputs_scale=0.25)
    inputs = torch.randn(7, 64, generator=torch.Generator().manual_seed(4))
    inputs[0, 0] = 1000  # more than the largest number with this scale
    assert find_error(HeldWeight(weight, inputs.dtype).multiply(inputs, None), expect(weight, inputs, None)) < 1e-5


def test_what_rows_have_adapters_for_is_added() -> None:
    source = torch.Generator().manual_seed(2)
    weight = make_weight(Scheme("fp8", inputs="fp8"), 24, 64, 0)
    inputs = torch.randn(7, 64, generator=source)
    down, up = torch.randn(2, 16, 64, generator=source), torch.randn(2, 24, 16, generator=source)
    held = HeldWeight(weight, torch.float32)
    for number in (0, 2):
        with use_adapter(number):
            out = held.multiply(inputs, None, LayerAdapters(down, up))
        expected = expect(weight, inputs, None)
        if number:
            expected = expected + (inputs @ down[number - 1].T @ up[number - 1].T).double()
        assert find_error(out, expected) < 1e-5


ADAPTED = {
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc"),
    "llama": ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"),
}


@pytest.mark.parametrize("family", ADAPTED)
def test_layers_of_a_patched_model_keep_their_adapters(family: str) -> None:
    model = quantise_model(build(family), "int4")
    source = torch.Generator().manual_seed(5)
    for name, module in model.named_modules():
        if name.endswith(ADAPTED[family]):
            weight = get_quantised(module)
            assert weight is not None
            columns, depth = weight.shape
            down, up = torch.randn(1, 16, depth, generator=source), torch.randn(1, columns, 16, generator=source)
            set_adapters(module, LayerAdapters(down, up))
    wide = copy.deepcopy(model)
    widen_all(wide)
    patched, expected = patch(model, Alone()), patch(wide, Alone())
    for number in (0, 1):
        with torch.inference_mode(), use_adapter(number):
            hidden, other = (each.compute_hidden(torch.arange(4, 13), torch.arange(9)) for each in (patched, expected))
        torch.testing.assert_close(hidden, other, rtol=1e-4, atol=1e-4)


def test_columns_in_another_order_take_their_own_inputs() -> None:
    weight = make_weight(Scheme("int4", 32), 24, 64, 0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3)).int()
    weight = replace(weight, order=order)
    inputs = torch.randn(7, 64, generator=torch.Generator().manual_seed(4))
    assert find_error(HeldWeight(weight, inputs.dtype).multiply(inputs, None), expect(weight, inputs, None)) < 1e-5


def test_operators_say_their_shapes_to_the_compiler() -> None:
    checks: Any = ("test_schema", "test_faketensor")
    weight = make_weight(Scheme("int4", 32, zeros=True), 24, 64, 0)
    inputs, bias = torch.randn(2, 7, 64), torch.randn(24)
    tensors = weight.values, weight.scales, weight.zeros
    arguments: tuple[Any, ...] = (inputs, None, *tensors, bias, "plain int4", torch.float32)
    torch.library.opcheck(torch.ops.batchgen.quantised_product, arguments, test_utils=checks)
    arguments = (
        inputs[0],
        inputs[0],
        None,
        *tensors,
        bias,
        "plain int4",
        torch.randn(1, 16, 64),
        torch.randn(1, 24, 16),
    )
    torch.library.opcheck(torch.ops.batchgen.adapted_quantised_product, arguments, test_utils=checks)
    experts = make_weight(Scheme("int8", inputs="int8"), 24, 64, 0, experts=3)
    stored, scales = round_inputs(inputs[0], "int8")
    order, offsets = torch.arange(14).int(), torch.tensor([0, 4, 4, 14]).int()
    arguments = (
        stored,
        scales,
        experts.values,
        experts.scales,
        None,
        None,
        "plain fp8",
        torch.float32,
        order,
        offsets,
        2,
    )
    torch.library.opcheck(torch.ops.batchgen.quantised_grouped_product, arguments, test_utils=checks)


def test_the_kernels_are_right() -> None:
    assert_none_wrong("tests.engines.paged.quantised_cases")
