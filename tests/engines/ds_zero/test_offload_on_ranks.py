"""The settings at work: two ranks of engine `ds-zero` on the CPU, their weights quantised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from batchgen.engines.ds_zero.quantization import make_quantization_section, plan_quantized
from batchgen.models.parameters import list_parameters
from tests import tiny_models as models
from tests.engines import engine_rank

RANKS = 2
SETS = (3, 7)

pytestmark = pytest.mark.slow


def expected(model: models.Model, count: int) -> dict[int, str | None]:
    return {generation.index: generation.text for generation in model.texts(engine_rank.prompts(count)).values()}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bloom"])
def test_quantised_weights_give_the_text_of_the_same_weights_rounded(
    name: str, bits: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from deepspeed.inference.quantization.utils import DeQuantizer, Quantizer

    folder = request.getfixturevalue(name)
    assert bits in (4, 8)
    settings = make_quantization_section(bits, 16)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"weight_quantization": settings}))

    texts = engine_rank.ranks(RANKS, folder, [f"config={config}"], tmp_path / "ranks", SETS)

    model = models.Model(folder, batch_size=4)
    exact = expected(model, SETS[-1])
    rounding = settings["quantized_initialization"]
    with torch.no_grad():
        rounded = set()
        for module in model.model.modules():
            if type(module) in (torch.nn.Linear, torch.nn.Embedding) and id(module.weight) not in rounded:
                whole = Quantizer(rounding).quantize(module.weight)
                module.weight.copy_(DeQuantizer(rounding, module.weight.dtype).dequantize(*whole))
                rounded.add(id(module.weight))
    assert texts == {count: expected(model, count) for count in SETS}
    assert texts[SETS[-1]] != exact  # lossy, as is said
    sizes = list_parameters(AutoConfig.from_pretrained(folder), torch.float32)
    assert plan_quantized(sizes, bits, 16).read_bytes < sizes.read_bytes / (1.8 if bits == 8 else 2.4)
