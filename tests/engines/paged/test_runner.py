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
from batchgen.generation.selftest import compute_logits
from tests.sweep.kinds import build


@pytest.mark.parametrize("tokens", [8, 40, 64])
def test_a_rehearsal_may_have_fewer_tokens_than_there_are_slots(tiny_llama: Path, tokens: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    runner = Runner(model, StepLimits(slots=40, sequence_tokens=4 * PAGE_SIZE, step_tokens=8))
    runner.allocate(1)
    with torch.inference_mode():
        runner.rehearse(tokens)


@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral", "gemma2", "cohere"])
def test_the_logits_of_a_row_alone_are_those_of_the_models_own_forward(family: str) -> None:
    model = build(family).eval()
    runner = Runner(model, StepLimits(slots=8, sequence_tokens=4 * PAGE_SIZE, step_tokens=32))
    words = model.config.get_text_config().vocab_size
    ids = torch.randint(words, (1, 23), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = compute_logits(model, ids, 6)
        assert torch.allclose(runner.compute_alone(ids, 6), expected, atol=1e-5)
        assert expected.std() > 0.05


@pytest.mark.parametrize("most", [64, 1088, 8192])
def test_a_graph_holds_its_tokens_and_wastes_little(most: int) -> None:
    sizes = {tokens: choose_graph_size(tokens, most) for tokens in range(1, most + 1)}
    assert all(tokens <= size <= most for tokens, size in sizes.items())
    assert all(size <= tokens * 5 / 4 for tokens, size in sizes.items() if tokens > 256)
    assert len(set(sizes.values())) <= 48
