"""Weights of 8 bits in the place of a layer's weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchgen.models.int8 import Int8Weight


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(48, 32, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 1, 48)[:, None]


def widened(weight: Int8Weight) -> torch.Tensor:
    return weight.values.float() * weight.scales.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_at_most_half_a_step_of_its_row(weight: torch.Tensor, dtype: torch.dtype) -> None:
    rounded = Int8Weight.rounded(weight, dtype)
    assert rounded.values.dtype == torch.int8
    assert rounded.dtype == dtype
    assert rounded.shape == weight.shape
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((widened(rounded) - weight).abs() <= 0.51 * steps).all()


def test_a_row_of_zeros_stays_one() -> None:
    assert not widened(Int8Weight.rounded(torch.zeros(2, 3), torch.float16)).any()


def test_memory_is_a_quarter_of_32_bits(weight: torch.Tensor) -> None:
    rounded = Int8Weight.rounded(weight, torch.float32)
    assert sum(buffer.nbytes for buffer in rounded.buffers()) == weight.nbytes / 4 + 4 * len(weight)


@pytest.mark.parametrize("at_once", [1 << 28, 1])
def test_layers_compute_with_it(weight: torch.Tensor, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchgen.models.int8._BYTES_AT_ONCE", at_once)
    rounded = Int8Weight.rounded(weight, torch.float32)
    layer, table = nn.Linear(32, 48), nn.Embedding(48, 32)
    for module in (layer, table):
        del module._parameters["weight"]
        module.weight = rounded  # type: ignore[assignment]
    inputs = torch.randn(2, 5, 32)
    torch.testing.assert_close(layer(inputs), inputs @ widened(rounded).T + layer.bias, rtol=1e-4, atol=1e-4)
    turned = torch.matmul(inputs, rounded.transpose(-1, -2))  # type: ignore[arg-type]
    torch.testing.assert_close(turned, inputs @ widened(rounded).T, rtol=1e-4, atol=1e-4)
    ids = torch.tensor([[3, 47], [0, 3]])
    assert torch.equal(table(ids), widened(rounded)[ids])
    # Shared, as a tied weight: it lies there once, and is saved under both names.
    assert nn.ModuleList([layer, table]).state_dict().keys() >= {"0.weight.values", "1.weight.scales"}
    assert len(list(nn.ModuleList([layer, table]).buffers())) == 2


def test_what_it_cannot_do_is_an_error(weight: torch.Tensor) -> None:
    rounded = Int8Weight.rounded(weight, torch.float32)
    with pytest.raises(TypeError, match="weights of 8 bits do not take part in"):
        torch.add(torch.ones(1), rounded)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="a matrix has two dimensions"):
        rounded.transpose(0, 2)
