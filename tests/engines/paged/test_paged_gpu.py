"""Engine `paged` on one GPU, in the 16 bits that its own kernels are for: `pytest -m gpu` where there is one."""

from __future__ import annotations

import json
import logging
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from batchgen.engine import Setup
from batchgen.engines.paged import warm_up
from batchgen.engines.paged.engine import Paged
from batchgen.world import World
from tests import tiny_models as models
from tests.engines.paged.families import rounded
from tests.engines.paged.families.__main__ import FAMILIES
from tests.engines.runs import command, read, run
from tests.tensor_parallel import test_texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize("cache", [(), ("--kv-dtype", "fp8")], ids=" ".join)
def test_prompts_longer_than_a_step_end_in_none_of_the_first(cache: tuple[str, ...], tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1024, "max_position_embeddings": 1024}
    model = models.save(tmp_path / "model", partial(models.llama, **shape))
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": "abcdefgh" * (30 + n), "max_new_tokens": 9}) + "\n" for n in range(5))
    )
    words = command(prompts, tmp_path / "out", model, "--batch-size", "1", "--set", "step_tokens=64", engine="paged")
    done = run(*words, "--dtype", "bfloat16", "--set", "cache_tokens=4096", *cache)
    assert done.returncode == 0, done.stderr
    assert all(0 < row["generated_tokens"] <= 9 for row in read(tmp_path / "out"))


@pytest.mark.parametrize("windows", [False, True])
def test_the_loaded_model_finds_compiled_what_was_compiled_while_it_was_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, windows: bool
) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1024, "max_position_embeddings": 1024, "num_hidden_layers": 4}
    kinds: dict[str, Any] = (
        {"layer_types": ["sliding_attention", "full_attention"] * 2, "use_sliding_window": True} if windows else {}
    )
    folder = models.save(tmp_path / "model", partial(models.qwen3, **shape, **kinds, sliding_window=64))
    torch._dynamo.reset()
    counters.clear()
    caplog.set_level(logging.DEBUG, warm_up.logger.name)
    setup = Setup(str(folder), "bfloat16", 16, World(), selftest=False)
    with Paged(setup, Paged.Options(cache_tokens=8192)) as engine:
        assert counters["stats"]["unique_graphs"] == len(set(kinds.get("layer_types", [""])))
        rows = models.random_prompts(8, max_new_tokens=8)
        generations = [row for batch in engine.generate(iter(rows), lambda: False) for row in batch.generations]
    assert [row.error for row in generations] == [None] * 8
    said = [record.getMessage() for record in caplog.records if record.name == warm_up.logger.name]
    assert sum("layers are compiled" in line for line in said) == 2
    assert not [line for line in said if "failed" in line or "no warm-up" in line]
    assert counters["stats"]["unique_graphs"] == len(set(kinds.get("layer_types", [""])))
    assert "warm-up" not in {thread.name.partition("_")[0] for thread in threading.enumerate()}


# The last hidden states of OPT-350M are narrower than its `hidden_size`; Transformers 5.17 gives Gemma 2 an attention
# without caps, and Hunyuan positions that wait for the GPU.
@pytest.mark.parametrize("name", ["OPT 350M", "Gemma 2 9B", "Hunyuan 7B"])
def test_log_probabilities_of_families_are_those_of_transformers_but_for_rounding(tmp_path: Path, name: str) -> None:
    found = rounded.check(FAMILIES[name], tmp_path, 24)
    assert found.is_kept, found


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_quantised_weights_say_the_same_in_batches_and_alone(name: str, dtype: str, tmp_path: Path) -> None:
    builds = {
        "llama": partial(models.llama, hidden_size=512, intermediate_size=1024),
        "qwen3_moe": partial(test_texts.build, name="qwen3_moe"),
    }
    model = models.save(tmp_path / "model", builds[name])
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": "abcdefgh" * (1 + n % 7), "max_new_tokens": 12}) + "\n" for n in range(90))
    )
    # The self-test computes rows of the first batch again, by the kernels of other numbers of tokens.
    done = run(*command(prompts, tmp_path / "out", model, "--batch-size", "80", engine="paged"), "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    assert len(read(tmp_path / "out")) == 90
