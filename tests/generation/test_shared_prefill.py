"""Rows of one prompt in a static batch: their prompt goes through the model once, and each text is what it is alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedModel, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from batchgen.models.definition.errors import ModelError
from batchgen.types import Generation, Prompt
from tests import tiny_models as models
from tests.tiny_models import Model, random_prompts

SAMPLES = 4


def recurrent_gemma(vocabulary: int) -> PreTrainedModel:
    """Three layers whose states are in its modules, outside of the cache."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    more = {"lru_width": 32, "attention_window_size": 24, "w_init_variance_scale": 1.0, "initializer_range": 0.3}
    tokens = {"bos_token_id": models.BEGIN, "eos_token_id": models.END, "pad_token_id": models.PAD}
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(vocab_size=vocabulary, **sizes, **more, **tokens))


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": models.llama,  # rotary positions
    "bloom": models.bloom,  # ALiBi: biases from the mask, and no positions
    "mistral": models.mistral,  # a window that is shorter than most prompts here
    "mamba": models.mamba,  # states in place of keys and values, in a cache of another name
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("models") / request.param
    return Model(models.save(folder, FAMILIES[request.param]), batch_size=32)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Model:
    return Model(tiny_llama, batch_size=32)


def samples_of(count: int, lengths: Sequence[int] = (50, 33, 7)) -> list[Prompt]:
    """So many samples of a prompt of each of these lengths; the last prompt is greedy, and its rows are repetitions."""
    made = random_prompts(len(lengths), max_new_tokens=20, temperature=1.0, ignore_eos=True)
    prompts = [
        dataclasses.replace(p, tokens=[models.BEGIN, *(4 + (7 * p.index + 31 * k) % 256 for k in range(length - 1))])
        for p, length in zip(made, lengths, strict=True)
    ]
    prompts[-1].params = dataclasses.replace(prompts[-1].params, temperature=0.0, logprobs=True)
    return [dataclasses.replace(prompt, sample=sample) for prompt in prompts for sample in range(count)]


def generate(model: Model, prompts: Sequence[Prompt]) -> tuple[dict[tuple[int, int], Generation], list[list[int]]]:
    """The generations by row and sample, and the shapes of the token ids that the model's embedding was given."""
    shapes: list[list[int]] = []
    embedding = model.model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, given: shapes.append(list(given[0].shape)))
    try:
        batches = model.run(prompts)
    finally:
        hook.remove()
    return {(g.index, g.sample): g for batch in batches for g in batch.generations}, shapes


def test_samples_are_computed_from_one_prefill_and_are_what_each_is_alone(model: Model) -> None:
    prompts = samples_of(SAMPLES)
    found, shapes = generate(model, prompts)
    assert shapes == [[3, 50], *[[12, 1]] * 19]
    alone = {}
    for prompt in prompts:
        alone |= generate(model, [prompt])[0]
    assert {key: _said(one) for key, one in found.items()} == {key: _said(one) for key, one in alone.items()}
    for key, one in found.items():
        assert one.logprobs == pytest.approx(alone[key].logprobs, abs=1e-4)
    texts = [one.text for one in found.values()]
    assert len(set(texts)) == 2 * SAMPLES + 1, "samples of a prompt must differ, or a wrong row would not show"


def test_rows_of_one_prompt_need_not_be_neighbours(llama: Model) -> None:
    prompts = samples_of(SAMPLES)
    mixed = [prompts[place] for place in (8, 0, 5, 1, 9, 4, 10)]
    found, shapes = generate(llama, mixed)
    assert shapes[0] == [3, 50]
    apart, _ = generate(llama, prompts)
    assert {key: one.text for key, one in found.items()} == {key: apart[key].text for key in found}


def test_a_batch_of_prompts_that_all_differ_is_left_as_it_is(llama: Model) -> None:
    hooks: set[int] = set()
    embedding = llama.model.get_input_embeddings()
    embedding.register_forward_pre_hook(
        lambda *_: hooks.add(len(llama.model._forward_hooks) + len(llama.model._forward_pre_hooks))
    )
    _, shapes = generate(llama, samples_of(1))
    assert (shapes[0], hooks) == ([3, 50], {0})
    generate(llama, samples_of(2))
    assert hooks == {0, 2}


def test_a_state_outside_of_the_cache_is_computed_for_each_row(tmp_path: Path) -> None:
    model = Model(models.save(tmp_path / "recurrent", recurrent_gemma), batch_size=32)
    prompts = samples_of(SAMPLES, (30,) * 3)  # of equal lengths: padding changes the rows of this kind
    found, shapes = generate(model, prompts)
    assert shapes[0] == [12, 30]
    alone = {}
    for prompt in prompts:
        alone |= generate(model, [prompt])[0]
    assert {key: _said(one) for key, one in found.items()} == {key: _said(one) for key, one in alone.items()}


def test_a_prefill_that_fails_leaves_nothing_behind(llama: Model, tiny_llama: Path) -> None:
    model = Model(tiny_llama, batch_size=32)
    outside = [dataclasses.replace(prompt, tokens=[1, 10**6]) for prompt in samples_of(2)]
    with pytest.raises(ModelError, match="index out"):
        model.run(outside)
    different = samples_of(1)
    found, shapes = generate(model, different)
    assert shapes[0] == [3, 50]
    assert found == generate(llama, different)[0]


def test_padding_of_a_prompt_counts_once(llama: Model) -> None:
    (batch,) = llama.run(samples_of(SAMPLES))
    ended_before = sum(20 - generation.generated_tokens for generation in batch.generations)
    assert batch.padded_tokens - ended_before == (50 - 33) + (50 - 7)
    (batch,) = llama.run(samples_of(1))
    assert batch.padded_tokens == (50 - 33) + (50 - 7)


def _said(one: Generation) -> tuple[object, ...]:
    return one.text, one.generated_tokens, one.finish_reason, one.error
