"""Static batches on tiny random models: the same tokens as one prompt at a time, whatever the batch."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import BartConfig, BartForCausalLM

from batchgen.models.definition.errors import ModelError
from batchgen.types import Prompt, SamplingParams
from tests import tiny_models as models
from tests.tiny_models import Model, random_prompts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Model:
    return Model(tiny_llama)


@pytest.fixture(scope="module")
def bloom(tiny_bloom: Path) -> Model:
    return Model(tiny_bloom)


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model without attention, whose batches have the size that memory allows."""
    return Model(models.save(tmp_path_factory.mktemp("models") / "mamba", models.mamba), batch_size=None)


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba"])
def test_a_batch_of_mixed_lengths_gives_the_tokens_of_one_prompt_at_a_time(
    name: str, request: pytest.FixtureRequest
) -> None:
    model: Model = request.getfixturevalue(name)
    prompts = random_prompts(20)
    counted = model.signs.generated_tokens
    generations = model.texts(prompts)
    expected = {prompt.id: model.alone(prompt) for prompt in prompts}
    assert len({token for tokens in expected.values() for token in tokens}) > 50, "the model repeats itself"
    for prompt in prompts:
        generation, tokens = generations[prompt.id], expected[prompt.id]
        assert (generation.text, generation.generated_tokens) == (model.tokenizer.decode(tokens), len(tokens))
        assert generation.finish_reason == ("stop" if tokens[-1] == models.END else "length")
        assert (generation.prompt_tokens, generation.columns) == (len(prompt.tokens), prompt.columns)
    assert model.signs.generated_tokens - counted == sum(map(len, expected.values()))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bloom"])
def test_the_weights_of_the_head_are_read_once_for_all_rows(name: str, request: pytest.FixtureRequest) -> None:
    model = Model(request.getfixturevalue(name))
    model.model.requires_grad_(False)  # as the loader of ds-inference leaves it
    vocabulary = model.model.config.vocab_size
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiled:
        model.run(random_prompts(8))
    products = [
        event.name
        for event in profiled.events()
        if event.name.endswith("mm") and any(vocabulary in shape for shape in event.input_shapes)
    ]
    assert set(products) == {"aten::mm"}


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_rows_that_ask_get_the_logprobs_of_the_model_itself(name: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(name)
    prompts = models.asking_prompts()
    found = model.texts(prompts)
    model.check_logprobs(prompts, found)
    quiet = [dataclasses.replace(p, params=dataclasses.replace(p.params, logprobs=False)) for p in prompts]
    assert {g.id: g.text for g in model.texts(quiet).values()} == {g.id: g.text for g in found.values()}


@pytest.mark.slow
def test_the_default_model_answers_in_a_batch_as_alone(smollm2: Path) -> None:
    model = Model(smollm2)
    model.model.float()
    questions = ["What is the capital of France?", "Hi", "Name three colours of the rainbow, with commas, please."]
    texts = [model.tokenizer.chat([{"role": "user", "content": question}]) for question in questions]
    prompts = [
        Prompt(number, str(number), number + 1, text, tokens, SamplingParams(max_new_tokens=12), {})
        for number, (text, tokens) in enumerate(zip(texts, model.tokenizer.tokenize(texts, special=False), strict=True))
    ]
    generations = model.texts(prompts)
    assert [generations[p.id].text for p in prompts] == [model.tokenizer.decode(model.alone(p)) for p in prompts]
    assert "Paris" in str(generations["0"].text)


def test_padding_is_counted_in_prompts_and_in_rows_that_have_ended(llama: Model) -> None:
    prompts = random_prompts(6)
    (batch,) = llama.run(prompts)
    longest_prompt = max(len(prompt.tokens) for prompt in prompts)
    longest = max(generation.generated_tokens for generation in batch.generations)
    computed = len(prompts) * (longest_prompt + longest)
    needed = sum(len(p.tokens) + g.generated_tokens for p, g in zip(prompts, batch.generations, strict=True))
    assert batch.padded_tokens == computed - needed > 0
    assert batch.peak_memory_bytes is not None
    assert llama.run(prompts[:1])[0].padded_tokens == 0


def test_the_models_own_generation_config_changes_nothing(tiny_llama: Path, tmp_path: Path, llama: Model) -> None:
    torch.manual_seed(0)
    folder = models.save(tmp_path / "opinionated", models.llama)
    settings = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0, "max_length": 7, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    prompts = random_prompts(5)
    assert Model(folder).texts(prompts) == llama.texts(prompts)


def test_several_end_tokens_each_end_a_row(tiny_llama: Path, tmp_path: Path, llama: Model) -> None:
    prompts = random_prompts(12, max_new_tokens=30)
    before = {prompt.id: llama.alone(prompt) for prompt in prompts}
    ends = {tokens[5] for tokens in before.values() if len(tokens) > 6}
    folder = models.save(tmp_path / "ends", models.llama)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(ends)}))
    generations = Model(folder).texts(prompts)
    for name, tokens in before.items():
        end = next((place for place, token in enumerate(tokens, 1) if token in ends | {models.END}), len(tokens))
        assert generations[name].generated_tokens == end
        has_ended = tokens[end - 1] in ends | {models.END}  # whose text is none of the row's
        assert generations[name].text == llama.tokenizer.decode(tokens[: end - has_ended])


def test_each_row_stops_at_its_own_stop_text_and_is_cut_before_it(llama: Model) -> None:
    prompts = random_prompts(8, max_new_tokens=40)
    plain = llama.texts(prompts)
    stops = [str(plain[p.id].text)[4:6] if p.index % 2 else "" for p in prompts]
    asked = [
        dataclasses.replace(p, params=dataclasses.replace(p.params, stop=(stop,))) if stop else p
        for p, stop in zip(prompts, stops, strict=True)
    ]
    assert sum(map(bool, stops)) >= 3
    for generation, stop in zip(llama.texts(asked).values(), stops, strict=True):
        free = plain[generation.id]
        if stop:
            assert generation.text == str(free.text).partition(stop)[0]
            assert generation.finish_reason == "stop"
            assert generation.generated_tokens < free.generated_tokens
        else:
            assert generation == free


def test_each_sample_of_a_row_has_its_own_generation_also_where_one_of_them_fails(tiny_llama: Path) -> None:
    """A padded row that is not finite is left out of its batch, and generated once more without padding."""
    model = Model(tiny_llama)
    with torch.no_grad():
        model.model.get_input_embeddings().weight[range(4, 260, 12)] = torch.nan
    tokens = [[1, 5, 6], [1, 7, 9, 10, 11], [1, 13]]
    base = [dataclasses.replace(p, tokens=t) for p, t in zip(random_prompts(3), tokens, strict=True)]
    params = SamplingParams(8, temperature=1.5)
    prompts = [dataclasses.replace(p, sample=sample, params=params) for p in base for sample in range(3)]
    found = {(g.index, g.sample): g for batch in model.run(prompts) for g in batch.generations}
    assert sorted(found) == [(p.index, p.sample) for p in prompts]
    outcomes = [{found[p.index, sample].error is None for sample in range(3)} for p in base]
    assert {True, False} in outcomes
    assert len({g.text for g in found.values() if g.error is None}) == sum(g.error is None for g in found.values()) > 2


def test_a_sampled_row_has_the_same_text_in_any_batch_and_order(llama: Model) -> None:
    prompts = [
        dataclasses.replace(p, params=dataclasses.replace(p.params, temperature=0.0 if p.index % 3 == 0 else 1.2))
        for p in random_prompts(12, max_new_tokens=20, top_p=0.95)
    ]
    together = llama.texts(prompts)
    assert llama.texts(prompts[::-1]) == together
    assert {name: g for p in prompts for name, g in llama.texts([p]).items()} == together
    greedy = [dataclasses.replace(p, params=dataclasses.replace(p.params, temperature=0.0)) for p in prompts]
    same = {name for name, generation in llama.texts(greedy).items() if generation == together[name]}
    assert same == {p.id for p in prompts if p.index % 3 == 0}
    other_seed = [dataclasses.replace(p, params=dataclasses.replace(p.params, seed=1)) for p in prompts]
    assert llama.texts(other_seed) != together


def test_top_k_of_one_is_greedy(llama: Model) -> None:
    prompts = random_prompts(6)
    sampled = [dataclasses.replace(p, params=dataclasses.replace(p.params, temperature=5.0, top_k=1)) for p in prompts]
    assert llama.texts(sampled) == llama.texts(prompts)


def test_a_batch_is_pulled_only_as_large_as_asked_and_nothing_is_lost(tiny_llama: Path) -> None:
    model = Model(tiny_llama, batch_size=5)
    pulled: list[int] = []

    def prompts() -> Iterator[Prompt]:
        for prompt in random_prompts(12, max_new_tokens=2):
            pulled.append(prompt.index)
            yield prompt

    sizes = []
    for batch in model.batches.run(prompts(), lambda: False):
        sizes.append(len(batch.generations))
        assert len(pulled) == sum(sizes)
    assert sizes == [5, 5, 2]


def test_without_a_batch_size_memory_decides(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(tiny_llama, batch_size=None)
    prompts = random_prompts(40, max_new_tokens=2)
    assert [len(batch.generations) for batch in model.run(prompts)] == [32, 8]
    monkeypatch.setattr("batchgen.device.host_free_bytes", lambda: 400_000)
    sizes = [len(batch.generations) for batch in model.run(prompts)]
    assert sum(sizes) == 40
    assert max(sizes) < 32


def test_a_stop_request_leaves_within_a_decode_step_and_yields_nothing_unfinished(tiny_llama: Path) -> None:
    model = Model(tiny_llama, batch_size=4)
    prompts = random_prompts(12, max_new_tokens=400)
    prompts = [dataclasses.replace(p, params=SamplingParams(400, temperature=1.0)) for p in prompts]
    finished = []
    for batch in model.batches.run(iter(prompts), lambda: model.signs.generated_tokens > 1700):
        finished.append(batch)
        assert model.signs.generated_tokens == sum(g.generated_tokens for b in finished for g in b.generations)
    assert len(finished) < 3
    assert model.signs.generated_tokens <= 1700 + 4


def test_a_stop_request_before_the_first_batch_pulls_nothing(llama: Model) -> None:
    prompts = iter(random_prompts(3))
    assert list(llama.batches.run(prompts, lambda: True)) == []
    assert len(list(prompts)) == 3


def test_a_short_row_does_not_take_the_positions_of_a_long_one(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [1.0, 2.0, 4.0, 9.0],
        "original_max_position_embeddings": 40,
    }
    model = Model(models.save(tmp_path / "long", models.llama, rope_parameters=rope))
    prompts = random_prompts(12)
    batches = model.run(prompts)
    assert len(batches) > 3
    found = {generation.id: generation.text for batch in batches for generation in batch.generations}
    assert found == {prompt.id: model.tokenizer.decode(model.alone(prompt)) for prompt in prompts}


def test_a_model_that_transformers_cannot_generate_with_is_one_sentence(tmp_path: Path) -> None:
    # Its cache has as many layers as the encoder, which a decoder alone does not have.
    sizes = {
        "d_model": 32,
        "decoder_layers": 2,
        "encoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 32,
    }
    folder = models.save(tmp_path / "bart", lambda size: BartForCausalLM(BartConfig(vocab_size=size, **sizes)))
    with pytest.raises(ModelError, match=r"cannot generate with the model in .*bart \(bart\): IndexError"):
        Model(folder).run(random_prompts(3))


def test_an_error_of_the_first_batch_is_the_models_and_any_other_error_leaves(tiny_llama: Path) -> None:
    model = Model(tiny_llama)
    outside = dataclasses.replace(random_prompts(1)[0], tokens=[1, 10**6])
    with pytest.raises(ModelError, match=r"cannot generate with the model in .*llama \(llama\): IndexError: index out"):
        model.run([outside])
    model.run(random_prompts(1))
    with pytest.raises(IndexError):
        model.run([outside])


def test_generating_says_nothing(
    llama: Model, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        llama.run(random_prompts(3, temperature=1.0, top_k=5, stop=("x",)))
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")
