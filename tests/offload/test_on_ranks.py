"""The settings at work: two ranks of engine `ds-zero` on the CPU, their weights on a disk or quantised."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from batchgen import extensions
from batchgen.models import cache_folder
from batchgen.offload import SwapFolder, nvme, parameters, quantization, quantized
from tests import models
from tests.engines import zero_rank

RANKS = 2
SETS = (3, 7)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wide_bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its matrices are large enough to be swapped, the tied embedding among them."""
    folder = tmp_path_factory.mktemp("models") / "bloom"
    return models.save(folder, lambda vocabulary, **settings: models.bloom(3000, **settings), hidden_size=768, n_head=8)


def expected(model: models.Model, count: int) -> dict[int, str | None]:
    return {generation.index: generation.text for generation in model.texts(zero_rank.prompts(count)).values()}


@pytest.mark.timeout(1200)  # the first time on a machine it is built
def test_weights_on_a_disk_give_the_same_text_in_the_bytes_that_were_planned(
    wide_bloom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # both are set by `prepare`, and put back after this test
    monkeypatch.setenv("PATH", os.environ["PATH"])
    extensions.prepare(cache_folder(os.environ), print)
    swap = SwapFolder(tmp_path, "run", 0)
    swap.clean()
    swap.open()
    sizes = parameters(AutoConfig.from_pretrained(wide_bloom), torch.float32)
    # As few buffers as a forward can do with, each just large enough.
    plan = nvme(sizes, RANKS, swap.path, pin_memory=False, lockable_bytes=0)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"zero_optimization": {"offload_param": plan.offload_param}, "aio": plan.aio}))

    texts = zero_rank.ranks(RANKS, wide_bloom, [f"config={config}"], tmp_path / "ranks", SETS)

    model = models.Model(wide_bloom, batch_size=4)
    assert texts == {count: expected(model, count) for count in SETS}
    assert sum(file.stat().st_size for file in swap.path.rglob("*.swp")) == plan.file_bytes * RANKS > 0
    for rank in (swap, SwapFolder(tmp_path, "run", 1)):
        if rank is not swap:
            rank.open()
        rank.close()
    assert not swap.path.exists()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bloom"])
def test_quantised_weights_give_the_text_of_the_same_weights_rounded(
    name: str, bits: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from deepspeed.inference.quantization.utils import DeQuantizer, Quantizer

    folder = request.getfixturevalue(name)
    assert bits in (4, 8)
    settings = quantization(bits, 16)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"weight_quantization": settings}))

    texts = zero_rank.ranks(RANKS, folder, [f"config={config}"], tmp_path / "ranks", SETS)

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
    sizes = parameters(AutoConfig.from_pretrained(folder), torch.float32)
    assert quantized(sizes, bits, 16).read_bytes < sizes.read_bytes / (1.8 if bits == 8 else 2.4)
