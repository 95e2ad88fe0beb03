"""Engine `accelerate` on a CUDA device: what the CPU cannot show. Run with `pytest -m gpu`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from batchgen import device
from batchgen.engine import EngineError
from batchgen.types import Generation, Prompt
from batchgen.world import World
from tests import tiny_models as models
from tests.engines.test_accelerate import load
from tests.tiny_models import Model, random_prompts

pytestmark = pytest.mark.gpu


@pytest.fixture
def limited_memory() -> Iterator[None]:
    """256 MiB for torch, beyond what it holds already."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + 256 * 2**20) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("build", [models.llama, partial(models.llama, num_key_value_heads=1), models.bloom])
def test_a_batch_on_the_gpu_gives_the_tokens_of_one_prompt_at_a_time(build: object, tmp_path: Path) -> None:
    model = Model(models.save(tmp_path / "model", build), device="cuda")
    prompts = random_prompts(20, stop=("\x00",)) + random_prompts(20)
    expected = [model.alone(prompt) for prompt in prompts]
    generations = [g for batch in model.run(prompts) for g in batch.generations]
    for prompt, generation, tokens in zip(prompts, generations, expected, strict=True):
        text = model.tokenizer.decode(tokens)
        assert generation.text == (text.partition("\x00")[0] if prompt.params.stop else text)
    assert model.signs.generated_tokens == sum(g.generated_tokens for g in generations)


def test_a_seed_gives_the_same_text_on_the_gpu_and_on_the_cpu(tiny_llama: Path) -> None:
    prompts = random_prompts(16, max_new_tokens=25, temperature=1.0, top_p=0.9, top_k=50)
    assert Model(tiny_llama, device="cuda").texts(prompts) == Model(tiny_llama).texts(prompts)


def test_the_devices_own_peak_and_size_are_used(tiny_llama: Path) -> None:
    prompts = random_prompts(600, max_new_tokens=1)
    with load(tiny_llama, batch_size=None) as engine:
        batches = list(engine.generate(iter(prompts), lambda: False))
        assert set(device.devices()) == {torch.cuda.get_device_name(0)}  # over several, if there are
    assert [len(batch.generations) for batch in batches] == [512, 88]
    peaks = [batch.peak_memory_bytes or 0 for batch in batches]
    assert 0 < peaks[1] < peaks[0] < 2**30


def test_running_out_of_gpu_memory_halves_the_batch(tmp_path: Path, limited_memory: None) -> None:
    folder = models.save(tmp_path / "wide", lambda _: models.llama(100_000, intermediate_size=20_000, hidden_size=8))
    model = Model(folder, batch_size=512, device="cuda")

    def prompt(number: int, length: int) -> Prompt:
        return dataclasses.replace(
            random_prompts(1, max_new_tokens=3)[0], index=number, id=str(number), line=number + 1, tokens=[9] * length
        )

    prompts = [prompt(number, 5000 if number == 100 else 8) for number in range(1024)]
    generations: list[Generation] = [g for batch in model.run(prompts) for g in batch.generations]
    assert [g.index for g in generations] == list(range(1024))
    assert [(g.index, g.error.type) for g in generations if g.error] == [(100, "out_of_memory")]
    assert (model.batches._sizer.limits.max_rows(11) or 512) < 512, "short prompts never ran out"


def test_a_rank_without_a_gpu_of_its_own_number_is_told(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() == 1:
        load(tiny_llama, world=World(1, 1, 2, 2)).close()  # the launcher shows each rank one GPU, number 0
    with pytest.raises(Exception, match=f"asks for GPU {torch.cuda.device_count()}, but there"):
        load(tiny_llama, f"device_map=cuda:{torch.cuda.device_count()}")
    monkeypatch.setenv("BATCHGEN_STARTER", "1")  # which shows all ranks the same GPUs
    last = torch.cuda.device_count()
    with pytest.raises(EngineError, match=f"local rank {last} asks for GPU {last}, but there"):
        load(tiny_llama, world=World(last, last, last + 1, last + 1))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_a_model_spread_by_accelerate_generates(tiny_llama: Path, dtype: str) -> None:
    with load(tiny_llama, "max_memory=0=1GiB,cpu=1GiB", dtype=dtype) as engine:
        generations = [g for b in engine.generate(iter(random_prompts(8)), lambda: False) for g in b.generations]
    assert len(generations) == 8
