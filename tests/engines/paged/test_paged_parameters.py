"""Engine `paged` and the parameters of rows: the tokens of a reference without a cache, in any step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from batchgen.types import Generation, Prompt
from tests import tiny_models as models
from tests.engines.paged.test_paged import load
from tests.generation import parameter_cases

# All at once; in chunks, a few at a time; and a cache so small that rows are preempted.
SETTINGS: dict[str, tuple[list[str], int | None]] = {
    "at once": ([], None),
    "in chunks": (["step_tokens=17"], 5),
    "preempted": (["cache_tokens=112", "expected_share=0.05", "step_tokens=64"], 16),
}


def run(folder: Path, settings: str, rows: Sequence[Prompt]) -> dict[str, Generation]:
    """What engine `paged` generates, by row."""
    options, batch_size = SETTINGS[settings]
    with load(folder, *options, batch_size=batch_size) as engine:
        generations = [one for batch in engine.generate(iter(rows), lambda: False) for one in batch.generations]
        assert (engine.preemptions > 0) == (settings == "preempted")
    assert len(generations) == len(rows)
    return {one.id: one for one in generations}


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> parameter_cases.Reference:
    return parameter_cases.Reference(models.Model(tiny_llama))


@pytest.mark.parametrize("settings", SETTINGS)
def test_each_parameter_does_what_its_definition_says(
    settings: str, tiny_llama: Path, reference: parameter_cases.Reference
) -> None:
    rows = parameter_cases.prompts_of_cases()
    parameter_cases.check(run(tiny_llama, settings, rows), rows, reference)
