"""Engines that share a model over two ranks generate what one process does, with kinds that need code of their own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from batchgen.types import Generation
from tests import tiny_models as models
from tests.engines import engine_rank
from tests.engines.ds_zero import zero_matrix
from tests.tensor_parallel import families

COUNT = 12  # prompts
KINDS: dict[str, dict[str, Any]] = {
    "cohere2": {},
    "deepseek_v2": {},
    "gemma3_text": {},
    "glm4": {},
    "gpt_oss": {},
    "granite": {},
    "mixtral": {},
    "olmo2": {},
    "phi3": {},
    "qwen3_moe": {},
    "qwen3_moe split": {"moe_intermediate_size": 128},
    "smollm3": {},
}
SCALED = ("gemma3_text",)
# A cache so small that rows are preempted, and steps so small that prompts are computed in chunks.
ENGINES = {
    "paged": ("tp=2", "cache_tokens=256", "expected_share=0.05", "step_tokens=16"),
    "ds-inference": ("tp=2",),
}


def build(vocabulary: int, name: str, **settings: Any) -> PreTrainedModel:
    """A model whose norms, biases and sinks differ from head to head."""
    ends = {"bos_token_id": models.BEGIN, "eos_token_id": models.END, "pad_token_id": models.PAD}
    shape = families.SHAPES[name] | KINDS.get(name, {}) | ends | {"vocab_size": vocabulary} | settings
    made: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.partition(" ")[0], **shape))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        if name in SCALED:
            made.get_input_embeddings().weight.mul_(0.1)  # or a model whose embeddings are tied repeats its input
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    scratch = tmp_path_factory.mktemp("models")
    return {name: models.save(scratch / name.replace(" ", "-"), partial(build, name=name)) for name in KINDS}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, dict[int, Generation]]:
    """What one process generates with each model."""
    found = {name: zero_matrix.alone(folder, engine_rank.prompts(COUNT)) for name, folder in folders.items()}
    for name, by_index in found.items():
        varied = [one for one in by_index.values() if one.text is not None and len(set(one.text)) > 4]
        assert len(varied) > COUNT / 3, f"{name} repeats itself, and any two ways to compute it would agree"
    return found


@pytest.fixture(scope="module", params=ENGINES)
def over_two(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What two ranks of an engine generate with each model."""
    results = tmp_path_factory.mktemp("ranks") / "two"
    engine = request.param
    engine_rank.ranks(2, list(folders.values()), ENGINES[engine], results, (COUNT,), engine=engine)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_texts_and_log_probabilities_are_those_of_one_process(
    name: str, folders: dict[str, Path], expected: dict[str, dict[int, Generation]], over_two: Path
) -> None:
    results = over_two / folders[name].name
    assert engine_rank.texts(results)[COUNT] == {index: one.text for index, one in expected[name].items()}
    zero_matrix.check_logprobs(engine_rank.logprobs(results)[COUNT], expected[name])
