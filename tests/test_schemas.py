"""Texts by JSON schemas are valid where they have ended by themselves; `scripts/schemas` has 300 of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchgen.requests.constraints import check
from batchgen.types import Constraint
from tests.schemas.draw import THEMES, draw
from tests.schemas.judge import MOST_BY_CHANCE, choose, find_fault, generate, problems
from tests.schemas.written import REFUSED, WRITTEN

KEYWORDS = (
    *("properties", "required", "additionalProperties", "enum", "const", "$ref", "$defs", "anyOf", "oneOf", "items"),
    *("minItems", "maxItems", "prefixItems", "minLength", "maxLength", "pattern", "format", "minimum", "maximum"),
    *("exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["paged", "accelerate"])
def test_every_text_that_ended_by_itself_is_valid(engine: str, smollm2: Path, tmp_path: Path) -> None:
    schemas = choose(30)
    outcome = generate(schemas | REFUSED, smollm2, engine, tmp_path)
    assert not problems(outcome)
    assert set(outcome.failed) == set(REFUSED)
    assert len(outcome.valid) > len(schemas) / 2


@pytest.mark.slow
def test_without_the_constraint_hardly_any_text_is_valid(smollm2: Path, tmp_path: Path) -> None:
    schemas = choose(30)
    outcome = generate(schemas, smollm2, "paged", tmp_path, is_constrained=False)
    assert not outcome.failed
    assert len(outcome.valid) <= MOST_BY_CHANCE * len(schemas)


def test_every_drawn_schema_can_be_enforced_and_all_keywords_are_drawn() -> None:
    drawn = [draw(seed) for seed in range(300)]
    assert {theme for theme, _ in drawn} == set(THEMES)
    texts = [json.dumps(schema, ensure_ascii=False) for _, schema in drawn]
    assert len(set(texts)) > 290
    for keyword in KEYWORDS:
        assert sum(f'"{keyword}": ' in text for text in texts) >= 10, keyword
    for text in [*texts, *(json.dumps(schema, ensure_ascii=False) for schema in WRITTEN.values())]:
        check(Constraint("json_schema", text))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be enforced") as seen:
        check(Constraint("json_schema", json.dumps(REFUSED[name])))
    assert name in str(seen.value)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("person", '{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 131}'),
        ("person", '{ "age": 36, "name": "Ada" }', '{"name": "Ada", "age": 36'),
        ("invoice", None, '{"number": "INV-1234", "due": "2026-02-30", "lines": [{"text": "", "cents": 1}]}'),
        ("moments", None, '{"day": "2026-02-28", "hour": "24:00:00Z", "both": "2026-02-28T00:00:00Z"}'),
        ("moments", '{"day": "2024-02-29", "hour": "23:59:60Z", "both": "2026-02-28T00:00:00.5+01:00"}', ""),
        ("identity", None, '{"id": "1", "mail": "a@b.org"}'),
        ("number alone", "0.5", "NaN"),
        ("tree", '{"value": 1, "children": []}', '{"value": 1, "children": [{"value": 10, "children": []}]}'),
        ("const object", json.dumps(WRITTEN["const object"]["const"]), "{}"),
    ],
)
def test_the_judge_tells_a_valid_text_from_others(name: str, good: str | None, bad: str) -> None:
    assert good is None or not find_fault(good, WRITTEN[name])
    assert find_fault(bad, WRITTEN[name])
