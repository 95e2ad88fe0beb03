"""Each parameter of a row, in static batches that mix all of them."""

from __future__ import annotations

from pathlib import Path

from tests.generation.parameter_cases import Reference, check, mixtures, prompts_of_cases
from tests.tiny_models import Model


def test_rows_of_all_parameters_in_one_batch_have_the_tokens_of_the_reference(tiny_llama: Path) -> None:
    model = Model(tiny_llama, batch_size=24)
    prompts = prompts_of_cases()
    check(model.texts(prompts), prompts, Reference(model))


def test_rows_of_random_mixtures_of_parameters_have_the_tokens_of_the_reference(tiny_llama: Path) -> None:
    model = Model(tiny_llama, batch_size=30)
    prompts = mixtures(60)
    found, reference = model.texts(prompts), Reference(model)
    failed = 0
    for prompt in prompts:
        expected, generation = reference.tokens(prompt), found[prompt.id]
        if not expected:
            failed += 1
            assert generation.error is not None
            assert generation.error.type == "no_token", prompt
            continue
        assert generation.details is not None, (prompt, generation.error)
        assert generation.details.token_ids == expected, prompt
    assert failed < 10
