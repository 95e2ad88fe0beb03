"""Engine `paged` on one GPU, in the 16 bits that its own kernels are for: `pytest -m gpu` where there is one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from tests import tiny_models as models
from tests.engines.runs import command, read, run
from tests.tensor_parallel import test_texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(300),
]


def test_prompts_longer_than_a_step_end_in_none_of_the_first(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1024, "max_position_embeddings": 1024}
    model = models.save(tmp_path / "model", partial(models.llama, **shape))
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": "abcdefgh" * (30 + n), "max_new_tokens": 9}) + "\n" for n in range(5))
    )
    words = command(prompts, tmp_path / "out", model, "--batch-size", "1", "--set", "step_tokens=64", engine="paged")
    done = run(*words, "--dtype", "bfloat16", "--set", "cache_tokens=4096")
    assert done.returncode == 0, done.stderr
    assert all(0 < row["generated_tokens"] <= 9 for row in read(tmp_path / "out"))


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
