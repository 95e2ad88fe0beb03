"""The log-probabilities of prompts, and of what beside them was likely, as rows get them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from batchgen.types import Prompt
from tests.tiny_models import Model, random_prompts

COUNT = 3


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Model:
    return Model(tiny_llama)


def asking(prompts: list[Prompt], count: int | None) -> list[Prompt]:
    return [dataclasses.replace(p, params=dataclasses.replace(p.params, prompt_logprobs=count)) for p in prompts]


def test_a_prompt_has_the_numbers_of_one_forward_over_it(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchgen.generation.prompt_logprobs._ELEMENTS_AT_ONCE", 7 * 260)
    prompts = [*random_prompts(4), *asking(random_prompts(9)[4:], COUNT)]
    prompts[4].tokens = prompts[4].tokens[:3]
    assert min(len(prompt.tokens) for prompt in prompts[4:]) < 7 < max(len(prompt.tokens) for prompt in prompts)
    found = llama.texts(prompts)
    assert all(found[prompt.id].details is None for prompt in prompts[:4])
    for prompt in prompts[4:]:
        details = found[prompt.id].details
        assert details is not None
        assert details.prompt_logprobs is not None
        first, *places = details.prompt_logprobs
        assert first is None
        with torch.inference_mode():
            logits = llama.model(torch.tensor([list(prompt.tokens)]), use_cache=False).logits[0, :-1].double()
        expected = logits.log_softmax(-1)
        for token, place, row in zip(prompt.tokens[1:], places, expected, strict=True):
            assert place is not None
            own, *likeliest = place
            assert (own.token, own.rank) == (token, int((row > row[token]).sum()) + 1)
            assert own.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert own.text == llama.tokenizer.token_text(token)
            assert [one.token for one in likeliest] == row.topk(COUNT).indices.tolist()
            assert [one.logprob for one in likeliest] == pytest.approx(row.topk(COUNT).values.tolist(), abs=1e-4)
            assert [one.rank for one in likeliest] == [1, 2, 3]


def test_a_prompt_of_one_token_has_nothing_but_none(llama: Model) -> None:
    (prompt,) = asking([dataclasses.replace(random_prompts(1)[0], tokens=[5])], 0)
    details = llama.texts([prompt])[prompt.id].details
    assert details is not None
    assert details.prompt_logprobs == [None]


def test_the_likeliest_tokens_are_beside_each_generated_one(llama: Model) -> None:
    prompts = random_prompts(6, max_new_tokens=8, logprobs=True)
    for prompt in prompts:
        prompt.params = dataclasses.replace(
            prompt.params,
            top_logprobs=prompt.index,
            temperature=1.0 if prompt.index % 2 else 0.0,
            return_token_ids=True,
        )
    for prompt in prompts:
        prompt_alone = llama.texts([prompt])[prompt.id]
        generation = llama.texts(prompts)[prompt.id]
        details = generation.details
        assert details is not None
        assert details.token_ids == (prompt_alone.details and prompt_alone.details.token_ids)
        if not prompt.params.top_logprobs:
            assert details.top_logprobs is None
            continue
        assert details.top_logprobs is not None
        assert {len(place) for place in details.top_logprobs} == {prompt.params.top_logprobs}
        for token, logprob, place in zip(
            details.token_ids or (), generation.logprobs or (), details.top_logprobs, strict=True
        ):
            assert [one.rank for one in place] == list(range(1, len(place) + 1))
            assert [one.logprob for one in place] == sorted((one.logprob for one in place), reverse=True)
            assert all(one.text == llama.tokenizer.token_text(one.token) for one in place)
            shown = {one.token: one.logprob for one in place}
            assert shown.get(token, logprob) == pytest.approx(logprob)
            if prompt.params.temperature == 0:
                assert place[0].token == token
