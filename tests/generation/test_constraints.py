"""Texts by a constraint, from a tiny model whose text is noise, and from the default model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from transformers import PreTrainedTokenizerFast

from batchgen.generation.matchers import Matchers
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Constraint, Generation, Markup, Prompt, SamplingParams, Thinking
from tests import tiny_models as models
from tests.tiny_models import END, END_OF_TURN, Model, random_prompts

SHORT = {"type": "string", "maxLength": 6}
NUMBER = {"type": "integer", "minimum": -3, "maximum": 250}

SCHEMAS: dict[str, Any] = {
    "nested": {
        "type": "object",
        "properties": {
            "outer": {"type": "object", "properties": {"inner": NUMBER}, "required": ["inner"]},
            "kind": {"enum": ["a", 3, None, True]},
        },
        "required": ["outer", "kind"],
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [NUMBER, SHORT], "items": False, "minItems": 2},
    "reference": {
        "$defs": {"node": {"type": "object", "properties": {"value": NUMBER}, "required": ["value"]}},
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/node"}, "right": {"$ref": "#/$defs/node"}},
        "required": ["left", "right"],
        "additionalProperties": False,
    },
    "one of several": {"anyOf": [{"const": "yes"}, NUMBER, {"type": "boolean"}]},
    "unicode": {
        "type": "object",
        "properties": {"größe": {"enum": ["klein", "groß", "大きい"]}},
        "required": ["größe"],
        "additionalProperties": False,
    },
    "pattern": {"type": "string", "pattern": "^[a-f]{2}-[0-9]{3}$"},
    "text": SHORT,
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "date": {"type": "string", "format": "date"},
}

CHOICES = ["yes", "no", "dépend", "はい", 'with "quotes"\n']


def rows_of(constraints: Sequence[Constraint | None], **params: Any) -> list[Prompt]:
    rows = random_prompts(len(constraints), longest=20)
    own: dict[str, Any] = {"max_new_tokens": 120, "temperature": 1.0} | params
    for row, constraint in zip(rows, constraints, strict=True):
        row.params = SamplingParams(**own, constraint=constraint)
    return rows


def free(rows: Sequence[Prompt]) -> list[Prompt]:
    return [dataclasses.replace(row, params=dataclasses.replace(row.params, constraint=None)) for row in rows]


def is_valid(text: str | None, schema: Mapping[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text or ""), schema, jsonschema.Draft202012Validator)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def is_right(generation: Generation, constraint: Constraint) -> bool:
    text = generation.text or ""
    if constraint.kind == "json_schema":
        return is_valid(text, json.loads(constraint.text))
    if constraint.kind == "choice":
        return text in json.loads(constraint.text)
    return re.fullmatch(constraint.text, text) is not None


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Model:
    return Model(tiny_llama, batch_size=32)


def test_every_row_that_ends_by_itself_is_what_it_has_to_be_and_none_is_by_accident(llama: Model) -> None:
    constraints = [Constraint("json_schema", json.dumps(schema, ensure_ascii=False)) for schema in SCHEMAS.values()]
    constraints += [
        Constraint("regex", "[α-ω]{2,5}|[0-9]+é"),
        Constraint("regex", r"(\d{1,3}\.){3}\d{1,3}"),
        Constraint("choice", json.dumps(CHOICES)),
    ]
    rows = rows_of(constraints * 3)
    found = llama.texts(rows)
    ended = [row for row in rows if found[row.id].finish_reason == "stop"]
    assert len(ended) >= 0.8 * len(rows)
    for row in ended:
        assert row.params.constraint is not None
        assert is_right(found[row.id], row.params.constraint), (row.params.constraint, found[row.id].text)
    assert len({found[row.id].text for row in rows}) > 0.5 * len(rows)
    accidents = llama.texts(free(rows))
    assert [row.id for row in rows if is_right(accidents[row.id], row.params.constraint or constraints[0])] == []


@pytest.mark.slow
def test_the_default_model_writes_json_by_a_schema(smollm2: Path) -> None:
    model = Model(smollm2, batch_size=6)
    model.model.float()
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "colour": {"enum": ["red", "grün", "青"]},
            "sizes": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 2},
        },
        "required": ["name", "colour", "sizes"],
        "additionalProperties": False,
    }
    ask = model.tokenizer.chat([{"role": "user", "content": "Describe a fruit in a few words."}])
    (tokens,) = model.tokenizer.tokenize([ask], special=False)
    params = SamplingParams(50, temperature=1.0, constraint=Constraint("json_schema", json.dumps(schema)))
    rows = [Prompt(number, f"{number}", 1, ask, tokens, params, {}) for number in range(5)]
    found = model.texts(rows)
    ended = [g.text for g in found.values() if g.finish_reason == "stop"]
    assert len(ended) >= 3
    assert [text for text in ended if not is_valid(text, schema)] == []
    assert len(set(ended)) == len(ended)
    assert not any(is_valid(g.text, schema) for g in model.texts(free(rows)[:2]).values())


def test_a_row_whose_constraint_cannot_be_compiled_fails_alone(llama: Model) -> None:
    bad = [
        Constraint("json_schema", '{"type": "array", "uniqueItems": true}'),
        Constraint("regex", "a(?=b)"),
        Constraint("grammar", "start: nothing"),
        Constraint("grammar", "root ::= ("),
    ]
    good = Constraint("choice", '["yes", "no"]')
    rows = rows_of([*bad, good, None])
    found = llama.texts(rows)
    for row in rows[: len(bad)]:
        error = found[row.id].error
        assert error is not None
        assert error.type == "constraint"
        assert re.match(rf"line {row.line}: the constraint could not be followed: \S", error.message)
        assert "\n" not in error.message
    assert "uniqueItems" in str(found[rows[0].id].error)
    assert found[rows[4].id].text in ("yes", "no")
    assert found[rows[5].id] == llama.texts(rows[5:])[rows[5].id]


def test_a_constrained_row_says_whether_it_was_cut(llama: Model) -> None:
    exact = Constraint("regex", "[a-z]{8}")
    open_ended = Constraint("regex", "[a-z]{8,}")
    cases = [
        (exact, {"max_new_tokens": 5}, "length", 5),
        (exact, {"max_new_tokens": 8}, "stop", 8),  # whole with its last token
        (exact, {}, "stop", 8),
        (open_ended, {"max_new_tokens": 20, "logit_bias": ((END, -100.0),)}, "length", 20),
        (open_ended, {"min_tokens": 12, "logit_bias": ((END, 100.0),)}, "stop", 13),
        (exact, {"min_tokens": 20}, "stop", 8),  # nothing can follow, whatever `min_tokens` is
        (exact, {"ignore_eos": True}, "stop", 8),
        (open_ended, {"ignore_eos": True, "logit_bias": ((END, 100.0),)}, "stop", 9),
    ]
    rows = [rows_of([constraint], **params)[0] for constraint, params, _, _ in cases]
    for number, row in enumerate(rows):
        row.index, row.id = number, f"{number}"
    found = llama.texts(rows)
    assert [(found[row.id].finish_reason, found[row.id].generated_tokens) for row in rows] == [
        (reason, length) for _, _, reason, length in cases
    ]
    assert all(re.fullmatch("[a-z]+", found[row.id].text or "") for row in rows)


def test_white_space_in_json_does_not_run_away(llama: Model) -> None:
    spaces = tuple((llama.tokenizer.tokenize([space], special=False)[0][0], 50.0) for space in " \n\t")
    constraint = Constraint("json_schema", '{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}')
    (found,) = llama.texts(rows_of([constraint], logit_bias=spaces, max_new_tokens=400)).values()
    assert found.finish_reason == "stop"
    runs = [len(run) for run in re.findall(r"\s+", found.text or "")]
    assert max(runs) == 25
    assert is_valid(found.text, json.loads(constraint.text))


def test_a_model_that_thinks_may_think_before_its_answer(llama: Model) -> None:
    """Its marks are single tokens here, and a bias lets it begin by itself, end, and begin again."""
    yes = Constraint("choice", '["yes", "no"]')
    marks = [Markup(Thinking("<s>", "<|end|>", is_open=is_open)) for is_open in (False, True, False)]
    biases = [((1, 30.0),), ((END_OF_TURN, 6.0), (END, -100.0)), ((1, -100.0),)]
    rows = rows_of([yes] * 3)
    for row, markup, bias in zip(rows, marks, biases, strict=True):
        row.markup = markup
        row.params = dataclasses.replace(
            row.params, logit_bias=bias, thinking_tokens=None if markup.thinking and markup.thinking.is_open else 6
        )
    found = [llama.texts(rows)[row.id] for row in rows]
    raw = [generation.details.raw_text or "" for generation in found if generation.details is not None]
    assert re.fullmatch(r"<s>.*<\|end\|>(yes|no)", raw[0], re.DOTALL)
    assert re.fullmatch(r".*?<\|end\|>(yes|no)", raw[1], re.DOTALL)
    assert raw[2] in ("yes", "no")
    counts = [generation.details.reasoning_tokens for generation in found if generation.details is not None]
    assert counts[0] == 6
    assert counts[2] == 0
    assert {generation.finish_reason for generation in found} == {"stop"}


def test_a_tokenizer_that_llguidance_does_not_know_is_read_by_the_texts_of_its_tokens(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "words", models.llama)
    words: PreTrainedTokenizerFast = models.sentencepiece_like_tokenizer()
    words.save_pretrained(folder)
    tokenizer = HfTokenizer(str(folder))
    matcher = Matchers(tokenizer).copy(Constraint("regex", "( good| day)+!"))
    accepted = []
    for _ in range(2):
        accepted.append([token for token in range(tokenizer.size) if matcher.validate_tokens([token]) == 1])
        assert matcher.consume_token(5)
    names = [[tokenizer.token_name(token) for token in tokens] for tokens in accepted]
    assert names == [["▁", "▁good", "▁day"], ["▁", "▁good", "▁day", "!"]]
    assert matcher.consume_token(8)
    assert matcher.is_stopped()
