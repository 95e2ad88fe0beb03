"""What a runner does before there are steps, and the sizes that it rounds to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from batchgen.engines.paged.graphs import choose_graph_size
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.runner import Runner
from batchgen.engines.paged.step import StepLimits


@pytest.mark.parametrize("tokens", [8, 40, 64])
def test_a_rehearsal_may_have_fewer_tokens_than_there_are_slots(tiny_llama: Path, tokens: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    runner = Runner(model, StepLimits(slots=40, sequence_tokens=4 * PAGE_SIZE, step_tokens=8))
    runner.allocate(1)
    with torch.inference_mode():
        runner.rehearse(tokens)


@pytest.mark.parametrize("most", [64, 1088, 8192])
def test_a_graph_holds_its_tokens_and_wastes_little(most: int) -> None:
    sizes = {tokens: choose_graph_size(tokens, most) for tokens in range(1, most + 1)}
    assert all(tokens <= size <= most for tokens, size in sizes.items())
    assert all(size <= tokens * 5 / 4 for tokens, size in sizes.items() if tokens > 256)
    assert len(set(sizes.values())) <= 48
