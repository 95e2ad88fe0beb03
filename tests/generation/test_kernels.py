"""The kernels that sample and edit logits compute what torch does."""

from __future__ import annotations

import pytest
import torch

from batchgen.generation.sampling import SamplingTensors, sample_rows
from batchgen.types import SamplingParams
from tests.kernels import assert_none_wrong


@pytest.mark.slow
def test_kernels_choose_the_same_tokens() -> None:
    assert_none_wrong("tests.generation.kernel_cases")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("params", [{}, {"top_p": 0.95}, {"top_k": 50}, {"min_p": 0.01}], ids=str)
def test_a_gpu_draws_the_tokens_of_the_cpu_from_a_large_vocabulary(params: dict[str, float]) -> None:
    count, size = 500, 128_256
    source = torch.Generator().manual_seed(11)
    logits = torch.randn(count, size, generator=source) * 3
    rows = torch.arange(count)
    seeds = torch.randint(-(2**63), 2**63 - 1, (count,), generator=source)
    drawn = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        tensors = SamplingTensors.of([SamplingParams(temperature=0.9, **params)] * count, device)
        drawn.append(sample_rows(*(each.to(device) for each in (logits, rows, seeds, rows)), tensors).cpu())
    # The kernel's sums are float32, off by some 1e-5: 0.005 draws that differ are expected, and 0.2 by top-p, whose
    # last token rounding decides.
    assert (drawn[0] != drawn[1]).sum() <= 1
    assert len(set(drawn[0].tolist())) > 50
