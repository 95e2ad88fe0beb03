"""The product with weights of 8 bits on a GPU against the same weights widened, in float64."""

from __future__ import annotations

import pytest
import torch

from batchgen.int8 import Int8Weight

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [1, 7, 33, 100, 512, 700])
@pytest.mark.parametrize("shape", [(128, 256), (1000, 72), (33, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_multiplies(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = Int8Weight.rounded(torch.randn(shape, device="cuda"), dtype)
    inputs = torch.randn(rows, shape[1], device="cuda", dtype=dtype)
    expected = inputs.double() @ (weight.values.double() * weight.scales.double()).T
    found = weight.times(inputs[None]).double()[0]
    assert (found - expected).norm() / expected.norm() < 5e-3
