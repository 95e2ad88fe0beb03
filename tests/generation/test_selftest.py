"""Whether a batch has changed the text: real models, and one whose mask is broken on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from batchgen.engine import EngineError, Setup
from batchgen.engines.accelerate import Accelerate
from batchgen.generation import selftest
from batchgen.generation.selftest import SelfTest
from batchgen.types import Constraint, Prompt
from batchgen.world import World
from tests.engines.runs import ROOT, command, rows
from tests.tiny_models import Model, random_prompts


@pytest.fixture(params=["tiny_llama", "tiny_bloom"])
def model(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture
def deaf_to_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that sees padding, as a kernel that ignores the mask does."""
    attend = torch.nn.functional.scaled_dot_product_attention

    def unmasked(*tensors: torch.Tensor, **options: object) -> torch.Tensor:
        return attend(*tensors, **{**options, "attn_mask": None, "is_causal": tensors[0].shape[-2] > 1})

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", unmasked)


def generated(folder: Path, prompts: list[Prompt], *, check: bool) -> int:
    with Accelerate(Setup(str(folder), "float32", 8, World(), selftest=check), Accelerate.Options()) as engine:
        return sum(len(batch.generations) for batch in engine.generate(iter(prompts), lambda: False))


def test_a_sound_model_passes(model: Path) -> None:
    assert generated(model, random_prompts(20), check=True) == 20


def test_a_batch_that_changes_the_text_is_stopped(deaf_to_its_mask: None, tiny_llama: Path) -> None:
    prompts = random_prompts(20)
    with pytest.raises(
        EngineError, match=r"self-test: in a batch of 8, row 'row-\d+' was given .* alone, .* is better"
    ):
        generated(tiny_llama, prompts, check=True)
    assert generated(tiny_llama, prompts, check=False) == 20


def test_a_token_that_is_not_a_number_is_no_rounding(tiny_llama: Path) -> None:
    made = Model(tiny_llama)
    with torch.no_grad():
        made.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(EngineError, match="self-test"):
        SelfTest(made.model, made.device, made.tokenizer.decode, 1).check(random_prompts(1)[0], [5, 6])


def test_near_ties_are_rounding(tiny_llama: Path) -> None:
    made, prompt = Model(tiny_llama), random_prompts(1)[0]
    tokens = made.alone(prompt)
    head = made.model.lm_head.weight
    with torch.no_grad():  # another token is as good as the first one
        head[200] = head[tokens[0]] * (1 + 1e-6)
    SelfTest(made.model, made.device, made.tokenizer.decode, 1).check(prompt, tokens[:1])


def test_greedy_rows_are_looked_at_the_shortest_and_the_longest() -> None:
    prompts = random_prompts(9)
    lengths = [len(prompt.tokens) for prompt in prompts]
    assert selftest.choose(prompts) == [lengths.index(min(lengths)), lengths.index(max(lengths))]
    sampled = [replace(prompt, params=replace(prompt.params, temperature=1.0)) for prompt in prompts]
    assert selftest.choose(sampled) == []
    assert selftest.choose([*sampled, prompts[0]]) == [9]


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.1},
        {"allowed_token_ids": (5,)},
        {"min_tokens": 1},
        {"constraint": Constraint("regex", "a")},
        {"thinking_tokens": 3},
    ],
)
def test_rows_whose_tokens_need_not_be_the_models_best_are_not_looked_at(params: dict[str, Any]) -> None:
    first, second = random_prompts(2)
    first.params = replace(first.params, **({"max_new_tokens": 9} | params))
    assert selftest.choose([first, second]) == [1]


BROKEN = """
import torch
embedding = torch.nn.functional.embedding
def shifted(ids, *weight, **options):
    return embedding(ids.roll(1, 0) if ids.dim() == 2 else ids, *weight, **options)
torch.nn.functional.embedding = shifted
"""


@pytest.mark.slow
def test_a_run_ends_with_the_evidence_and_goes_on_if_told_to(tiny_llama: Path, tmp_path: Path) -> None:
    # Each row gets the text of its neighbour: fluent, and wrong.
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BROKEN)
    environment = {**os.environ, "PYTHONPATH": f"{site}:{ROOT}", "OMP_NUM_THREADS": "1"}
    words = command(rows(tmp_path / "p.jsonl", 8), tmp_path / "out", tiny_llama, "--batch-size", "4")
    words[words.index("ds-zero")] = "accelerate"
    assert words[0] == sys.executable
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 4, done.stderr
    assert "Error: self-test: in a batch of 4, row 'p.jsonl:" in done.stderr
    recorded = [file.read_text() for file in (tmp_path / "out").glob("generations*")]
    assert not any(recorded), "wrong text was kept"
    done = subprocess.run(
        [*words, "--no-selftest"], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_rounding_beyond_the_usual_is_measured_on_the_model(smollm2: Path) -> None:
    """bitsandbytes rounds activations to 8 bits, by batch: a sound row is further behind than 16 bits explain."""
    setup = Setup(str(smollm2), "int8", 2, World(), selftest=False)
    with Accelerate(setup, Accelerate.Options()) as engine:
        assert engine._batches is not None
        loaded = engine._batches.loaded
        model, device, tokenizer = loaded.model, loaded.device, loaded.tokenizer
        [tokens] = tokenizer.tokenize(["My favourite things are"], special=True)
        prompt = replace(random_prompts(1)[0], tokens=tokens)
        compute = partial(selftest.compute_logits, model)
        [logits] = selftest.logits_of(compute, prompt.tokens, [0], device)
        behind = (logits.max() - logits) / logits.std()
        near, far = (int((behind - distance).abs().argmin()) for distance in (0.35, 0.95))
        assert 0.26 < behind[near] < 0.45
        assert behind[far] > 0.76
        test = SelfTest(model, device, tokenizer.decode, 2)
        test.check(prompt, [near])
        for strict, token in ((test, far), (replace(test, measures=False), near)):
            with pytest.raises(EngineError, match=r"alone, .* is better by 0\.\d+ standard deviations"):
                strict.check(prompt, [token])
