"""Constraints that no text can meet, that other parameters stand against, or that are too much: in each engine alike.

A row that fails is an error row, and changes no other row; a good row's text is what its constraint demands.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from batchgen import Host, RunSettings, run
from tests import tiny_models
from tests.commands.starts import ENVIRONMENT, read_rows, write_rows
from tests.schemas.judge import find_fault

NO_TOKEN_LEFT = "none of the model's tokens can come next, and the text is not complete"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "string", "maxLength": 5}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
MANY = {f"p{number}": {"type": "integer"} for number in range(5000)}

# Parameters of a row, and what its sentence must say.
FAILING: dict[str, tuple[dict[str, Any], str]] = {
    "no text at all": ({"regex": r"[^\s\S]"}, NO_TOKEN_LEFT),
    "none of several samples": ({"regex": r"[^\s\S]", "n": 3, "temperature": 1.0}, NO_TOKEN_LEFT),
    "none, and no end either": ({"regex": r"[^\s\S]", "ignore_eos": True}, NO_TOKEN_LEFT),
    "none that could be cut at its length": ({"regex": r"[^\s\S]", "max_new_tokens": 1}, NO_TOKEN_LEFT),
    "a rule of itself": ({"grammar": "start: start"}, NO_TOKEN_LEFT),
    "no end": ({"grammar": 'start: "a" rest\nrest: "b" rest'}, "Too many items"),
    "too many properties": ({"json_schema": {"type": "object", "properties": MANY}}, "Make it simpler"),
    "too long": ({"regex": "a{1000000}"}, "too many expressions"),
    "broken": ({"json_schema": SCHEMA | {"uniqueItems": True}}, "the schema uses uniqueItems"),
    "allowed tokens": ({"json_schema": SCHEMA, "allowed_token_ids": [70, 71]}, "no token was left"),
    "bad words": ({"choice": ["abc"], "bad_words": ["b"]}, "no token was left"),
    "no choice": ({"choice": []}, "choice must be a list of texts, none of them empty, not an empty list"),
    # The end of a sequence is its only token: the text would have ended before it was complete.
    "a special token's name out of pieces": ({"regex": "a</[s]>b"}, "doesn't satisfy the grammar"),
    "syntax": ({"grammar": "start: )"}, "line 1, column 8"),
}
# And a regular expression for the text, with the reason why it ends.
GOOD: dict[str, tuple[dict[str, Any], str, str]] = {
    "empty": ({"grammar": "start: "}, "", "stop"),
    "end of sequence ignored": ({"choice": ["a", "ab"], "ignore_eos": True}, "ab?", "stop"),
    "more tokens than the text may have": ({"choice": ["a", "ab"], "min_tokens": 30}, "ab?", "stop"),
    "a stop text inside of JSON": ({"json_schema": SCHEMA, "stop": ['"b"']}, r'\{"a":"(x|yy)",', "stop"),
    "the end of sequence forbidden": ({"choice": ["a", "ab"], "logit_bias": {"2": -100}}, "ab?", "stop"),
    "a stop token inside": ({"choice": ["abc"], "stop_token_ids": [69]}, "a", "stop"),
    "cut": ({"choice": ["abc"], "max_new_tokens": 2}, "ab", "length"),
    "as long as it may be": ({"choice": ["abc"], "max_new_tokens": 3}, "abc", "stop"),
    "a special token's name": ({"choice": ["a</s>b"]}, "a</s>b", "stop"),
    "its name, escaped": ({"regex": r"a<\/s>b"}, "a</s>b", "stop"),
    "its name in JSON": ({"json_schema": {"enum": ["</s>"]}}, '"</s>"', "stop"),
    "many choices": ({"json_schema": {"enum": [f"value {n}" for n in range(20000)]}}, r'"value \d+"', "stop"),
}
WHOLE = ("one", "another", "third")  # rows that share a schema


@pytest.fixture(scope="module", params=["accelerate", "paged"])
def output(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    place = tmp_path_factory.mktemp(request.param)
    asked: dict[str, dict[str, Any]] = {name: params for name, (params, _) in FAILING.items()}
    asked |= {name: params for name, (params, *_) in GOOD.items()}
    asked |= {name: {"json_schema": SCHEMA, "temperature": 1.0, "max_new_tokens": 60} for name in WHOLE}
    rows = [{"id": name, "prompt": name, "max_new_tokens": 32, **params} for name, params in asked.items()]
    settings = RunSettings(model=str(tiny_llama), engine=request.param, dtype="float32", batch_size=9)
    run(str(write_rows(place / "in.jsonl", rows)), place / "out", settings, host=Host(ENVIRONMENT))
    return {row["id"]: row for row in read_rows(place / "out" / "generations.jsonl")}


def test_a_constraint_that_cannot_be_met_is_an_error_row(output: dict[str, dict[str, Any]]) -> None:
    for name, (_, sentence) in FAILING.items():
        row = output[name]
        assert row["error"] is not None, (name, row["text"])
        assert sentence in row["error"]["message"], name
        assert row["text"] is None


def test_a_constraint_wins_over_what_would_go_on_and_over_nothing_else(output: dict[str, dict[str, Any]]) -> None:
    for name, (_, pattern, reason) in GOOD.items():
        row = output[name]
        assert row["error"] is None, (name, row["error"])
        assert re.fullmatch(pattern, row["text"]), (name, row["text"])
        assert row["finish_reason"] == reason, name


def test_rows_beside_those_that_fail_are_as_their_schema_says(output: dict[str, dict[str, Any]]) -> None:
    for name in WHOLE:
        assert output[name]["finish_reason"] == "stop"
        assert not find_fault(output[name]["text"], SCHEMA)


def test_a_tokenizer_that_cannot_write_the_text_fails_that_row_alone(tmp_path: Path) -> None:
    """It has no token for the letter and the digits that are demanded, and none for single bytes."""
    model, tokenizer = tmp_path / "model", tiny_models.sentencepiece_like_tokenizer()
    tiny_models.llama(len(tokenizer), pad_token_id=0).save_pretrained(model)
    tokenizer.save_pretrained(model)
    asks = {"é": {"choice": ["é"]}, "number": {"json_schema": {"type": "integer"}}, "day": {"choice": ["a good day"]}}
    rows = [{"id": name, "prompt": "a", **params} for name, params in asks.items()]
    path = write_rows(tmp_path / "in.jsonl", rows)
    for engine in ("accelerate", "paged"):
        out = tmp_path / engine
        settings = RunSettings(model=str(model), engine=engine, dtype="float32")
        run(str(path), out, settings, host=Host(ENVIRONMENT))
        failed = {row["id"]: row for row in read_rows(out / "generations.jsonl")}
        day = failed.pop("day")
        assert (day["text"], day["error"]) == ("a good day", None)
        assert all(NO_TOKEN_LEFT in json.dumps(row["error"]) for row in failed.values()), failed
