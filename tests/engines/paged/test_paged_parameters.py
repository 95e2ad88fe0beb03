"""Engine `paged` and the parameters of rows: the tokens of a reference without a cache, in any step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from batchgen.engines.paged.finished_rows import FinishedRow
from batchgen.engines.paged.loop import Loop
from batchgen.types import Prompt, SamplingParams
from tests import tiny_models as models
from tests.engines.paged.test_paged import load
from tests.generation import parameter_cases

# All at once; in chunks, a few at a time; and a cache so small that rows are preempted.
SETTINGS: dict[str, tuple[list[str], int | None]] = {
    "at once": ([], None),
    "in chunks": (["step_tokens=17"], 5),
    "preempted": (["cache_tokens=96", "expected_share=0.05", "step_tokens=64"], 16),
}


def tokens_of(
    folder: Path, settings: str, rows: Sequence[Prompt], monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[int]]:
    """What engine `paged` generates, by row."""
    found: dict[str, list[int]] = {}
    collect = Loop.collect

    def collected(loop: Loop, timeout: float) -> list[FinishedRow] | None:
        finished = collect(loop, timeout)
        found.update((row.prompt.id, row.tokens) for row in finished or () if row.tokens is not None)
        return finished

    monkeypatch.setattr(Loop, "collect", collected)
    options, batch_size = SETTINGS[settings]
    with load(folder, *options, batch_size=batch_size) as engine:
        generations = [one for batch in engine.generate(iter(rows), lambda: False) for one in batch.generations]
        assert (engine.preemptions > 0) == (settings == "preempted")
    assert [one.error for one in generations if one.error] == []
    return found


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> parameter_cases.Reference:
    return parameter_cases.Reference(models.Model(tiny_llama))


@pytest.mark.parametrize("settings", SETTINGS)
def test_each_parameter_does_what_its_definition_says(
    settings: str, tiny_llama: Path, reference: parameter_cases.Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = parameter_cases.prompts_of_cases()
    parameter_cases.check(tokens_of(tiny_llama, settings, rows, monkeypatch), rows, reference)


@pytest.mark.parametrize("settings", SETTINGS)
def test_words_of_several_tokens_are_kept_out_beside_rows_that_wait_for_nothing(
    settings: str, tiny_llama: Path, reference: parameter_cases.Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = models.Model(tiny_llama).tokenizer
    letters = tuple(token for (token,) in tokenizer.tokenize(list("abcdefghij"), special=False))
    rows = models.random_prompts(40, max_new_tokens=24)
    for row in rows[::2]:
        row.params = SamplingParams(24, temperature=0.3 * (row.index % 4), allowed_token_ids=letters)
        said = tokenizer.decode(reference.tokens(row))
        row.params = replace(row.params, bad_words=(said[:2], said[3:6], said[9:11]))
        assert said[:2] in said
    expected = {row.id: reference.tokens(row) for row in rows}
    assert tokens_of(tiny_llama, settings, rows, monkeypatch) == expected
    for row in rows[::2]:
        assert not any(word in tokenizer.decode(expected[row.id]) for word in row.params.bad_words)
