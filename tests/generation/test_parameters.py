"""Each parameter of a row, in static batches that mix all of them."""

from __future__ import annotations

from pathlib import Path

from tests.generation.parameter_cases import Reference, check, prompts_of_cases
from tests.tiny_models import Model


def test_rows_of_all_parameters_in_one_batch_have_the_tokens_of_the_reference(tiny_llama: Path) -> None:
    model = Model(tiny_llama, batch_size=24)
    prompts = prompts_of_cases()
    check(model.texts(prompts), prompts, Reference(model))
