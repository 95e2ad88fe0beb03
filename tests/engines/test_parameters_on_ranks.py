"""The parameters of rows in engines whose ranks generate static batches together, or in the same steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engines import engine_rank
from tests.generation import parameter_cases
from tests.tiny_models import Model


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ds-inference", "ds-zero"])
def test_over_two_ranks_each_parameter_does_what_its_definition_says(
    engine: str, tiny_llama: Path, tmp_path: Path
) -> None:
    found = engine_rank.ranks(2, tiny_llama, [], tmp_path / "ranks", (engine_rank.CASES,), engine=engine)
    model = Model(tiny_llama)
    reference = parameter_cases.Reference(model)
    assert found[engine_rank.CASES] == {row.index: str(reference.tokens(row)) for row in engine_rank.cases()}
    logprobs = engine_rank.logprobs(tmp_path / "ranks")[engine_rank.CASES]
    asking = [row for row in engine_rank.cases() if row.params.prompt_logprobs]
    assert logprobs.keys() == {row.index for row in asking}
    for row in asking:
        expected = model.logprobs(replace(row, tokens=row.tokens[:1]), row.tokens[1:])
        assert logprobs[row.index] == pytest.approx(expected, rel=1e-4, abs=1e-4)
