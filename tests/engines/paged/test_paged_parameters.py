"""Engine `paged` and the parameters of rows: the tokens of a reference without a cache, in any step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchgen.engine import Setup
from batchgen.engines.accelerate import Accelerate
from batchgen.types import Batch, Constraint, Generation, Markup, Prompt, SamplingParams, Thinking
from batchgen.world import World
from tests import tiny_models as models
from tests.engines.paged.test_paged import load, prompts, texts
from tests.engines.paged.test_paged_memory import FailingForward, plain_path
from tests.generation import parameter_cases
from tests.generation.parameter_cases import FEW_LETTERS
from tests.tiny_models import END

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


@plain_path
def test_steps_that_are_lost_for_want_of_memory_choose_the_same_again(
    tiny_llama: Path, reference: parameter_cases.Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = parameter_cases.prompts_of_cases()
    with load(tiny_llama, "cache_tokens=2000", batch_size=32, selftest=False) as engine:
        forwards = FailingForward(monkeypatch, calls=(3, 4, 20, 31))
        found = texts(engine, rows)
        assert forwards.count > 31
    monkeypatch.undo()
    parameter_cases.check(found, rows, reference)


def asking_rows(count: int = 40) -> list[Prompt]:
    """Rows that ask for all kinds of things to be told, and end in all kinds of ways; a third of them begin alike."""
    thinks = Markup(Thinking("a", "b", is_open=True))
    kinds: list[dict[str, Any]] = [
        {"prompt_logprobs": 3, "logprobs": True, "top_logprobs": 5},
        {"prompt_logprobs": 0, "stop": ("a", "é", "</s>"), "include_stop_str_in_output": True},
        {"stop": ("be", "e"), "min_tokens": 4, "return_token_ids": True, "allowed_token_ids": FEW_LETTERS},
        {"temperature": 1.0, "logprobs": True, "top_logprobs": 2, "stop_token_ids": (*range(70, 110),), "seed": 4},
        {"temperature": 1.0, "stop": ("c",), "repetition_penalty": 1.2, "allowed_token_ids": (END, *FEW_LETTERS)},
        {"constraint": Constraint("regex", "[a-f]{3,9}"), "logprobs": True, "top_logprobs": 1, "stop": ("cc",)},
        {"constraint": Constraint("regex", "[a-f ]+"), "thinking_tokens": 3, "stop": ("d",), "prompt_logprobs": 1},
        {},
    ]
    rows = prompts(count)
    for number, row in enumerate(rows):
        params = kinds[number % len(kinds)]
        row.params = SamplingParams(**{"max_new_tokens": 5 + number % 20} | params)
        row.markup = thinks if "thinking_tokens" in params or number % 16 == 9 else None
    return rows


def numbers_of(generation: Generation) -> list[float]:
    """All log-probabilities of a row, which are taken out of it."""
    found, generation.logprobs = list(generation.logprobs or ()), None
    details = generation.details
    if details is not None:
        places = [*(details.top_logprobs or ()), *(place for place in details.prompt_logprobs or () if place)]
        found += [one.logprob for place in places for one in place]
        bare = [[one._replace(logprob=0.0) for one in place or ()] for place in details.prompt_logprobs or ()]
        details.prompt_logprobs = bare
        details.top_logprobs = [[one._replace(logprob=0.0) for one in place] for place in details.top_logprobs or ()]
    return found


@pytest.fixture(scope="module")
def asking(tiny_llama: Path) -> dict[str, Generation]:
    """What a static batch says of them."""
    with Accelerate(Setup(str(tiny_llama), "float32", 8, World()), Accelerate.Options()) as engine:
        return texts(engine, asking_rows())


@pytest.mark.parametrize("settings", SETTINGS)
def test_rows_end_and_are_described_as_in_static_batches(
    settings: str, tiny_llama: Path, asking: dict[str, Generation]
) -> None:
    rows, expected = asking_rows(), copy.deepcopy(asking)
    found = run(tiny_llama, settings, rows)
    for row in rows:
        logprobs = numbers_of(expected[row.id])
        assert numbers_of(found[row.id]) == pytest.approx(logprobs, abs=1e-4)
        assert found[row.id] == expected[row.id]
        assert len(logprobs) >= len(row.tokens) - 1 or row.params.prompt_logprobs is None
    assert {one.details.stop_reason for one in expected.values() if one.details} >= {None, "e", "c", "cc", "d"}
    assert any(isinstance(one.details.stop_reason, int) for one in expected.values() if one.details)


def test_rows_that_cannot_go_on_fail_alone(tiny_llama: Path) -> None:
    rows = models.random_prompts(30, max_new_tokens=12, longest=20)
    expected = run(tiny_llama, "in chunks", rows)
    impossible: list[tuple[str | None, dict[str, Any]]] = [
        (None, {}),
        ("constraint", {"constraint": Constraint("regex", "(b")}),
        ("no_token", {"allowed_token_ids": FEW_LETTERS[:1], "bad_words": ("a",)}),
        ("no_token", {"allowed_token_ids": FEW_LETTERS[1:], "constraint": Constraint("choice", '["a"]')}),
    ]
    for row in rows:
        row.params = SamplingParams(12, **impossible[row.index % 4][1])
    found = run(tiny_llama, "in chunks", rows)
    for row in rows:
        error, kind = found[row.id].error, impossible[row.index % 4][0]
        assert (error and error.type) == kind, (row.index, found[row.id].text)
        if error is None:
            assert found[row.id] == expected[row.id]
        else:
            assert error.message.startswith(f"line {row.line}: ")


def test_samples_of_a_row_are_drawn_as_in_static_batches(tiny_llama: Path) -> None:
    rows = [
        replace(row, sample=sample, params=replace(row.params, temperature=1.0, n=4))
        for row in models.random_prompts(6, max_new_tokens=12)
        for sample in range(4)
    ]
    with Accelerate(Setup(str(tiny_llama), "float32", 8, World()), Accelerate.Options()) as engine:
        expected = sorted_texts(engine.generate(iter(rows), lambda: False))
    with load(tiny_llama, "cache_tokens=112", "expected_share=0.05", "step_tokens=64") as engine:
        assert sorted_texts(engine.generate(iter(rows), lambda: False)) == expected
        assert engine.preemptions > 0
    assert len({text for _, _, text in expected}) > 20


def sorted_texts(batches: Iterable[Batch]) -> list[tuple[int, int, str | None]]:
    """The text of each sample of each row."""
    return sorted((one.index, one.sample, one.text) for batch in batches for one in batch.generations)
