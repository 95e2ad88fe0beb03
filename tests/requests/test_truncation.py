"""Prompts that a body cuts, and token ids in parameters that the model does not have."""

from __future__ import annotations

import pytest

from batchgen.requests.recipe import Recipe
from batchgen.types import FIT, SamplingParams
from tests.byte_tokenizer import BOS, ByteTokenizer, request
from tests.requests.test_prompts import error, prompt

COMPLETIONS = "/v1/completions"


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ({}, b"123456"),
        ({"truncate_prompt_tokens": 100}, b"123456"),
        ({"truncate_prompt_tokens": 3}, b"56"),
        ({"truncate_prompt_tokens": 3.0, "truncation_side": "left"}, b"56"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, b"12"),
        ({"truncation_side": "right"}, b"123456"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 6}, b"456"),
        ({"truncate_prompt_tokens": 7, "max_tokens": 3}, b"123456"),
    ],
)
def test_a_body_cuts_its_prompt_and_keeps_what_the_tokenizer_adds(body: dict[str, object], kept: bytes) -> None:
    line = request({"max_tokens": 2, "prompt": "123456", **body}, COMPLETIONS)
    result = prompt(line, Recipe(sampling=SamplingParams(max_new_tokens=2)), ByteTokenizer(context=10))
    assert list(result.tokens) == [BOS, *kept]


def test_minus_one_leaves_a_token_where_the_length_is_what_fits() -> None:
    line = request({"prompt": "123456789", "truncate_prompt_tokens": -1}, COMPLETIONS)
    result = prompt(line, Recipe(sampling=SamplingParams(max_new_tokens=FIT)), ByteTokenizer(context=8))
    assert (list(result.tokens), result.params.max_new_tokens) == ([BOS, *b"456789"], 1)


@pytest.mark.parametrize("kept", [1, -1])
def test_a_prompt_is_not_cut_to_nothing(kept: int) -> None:
    line = request({"prompt": "123", "truncate_prompt_tokens": kept, "max_tokens": 9}, COMPLETIONS)
    failed = error(line, tokenizer=ByteTokenizer(context=10))
    assert failed.type == "too_long"
    assert "body.truncate_prompt_tokens leaves no token of the prompt" in failed.message


def test_the_fewest_tokens_must_fit_the_context() -> None:
    recipe = Recipe(sampling=SamplingParams(max_new_tokens=FIT, min_tokens=5))
    assert prompt({"prompt": "1234"}, recipe, ByteTokenizer(context=10)).params.max_new_tokens == 5
    failed = error({"prompt": "12345"}, recipe, ByteTokenizer(context=10))
    assert failed.type == "too_long"
    assert "min_tokens is 5, but the context leaves room for 4 new tokens" in failed.message


@pytest.mark.parametrize(
    "own", [{"logit_bias": {"257": 1}}, {"allowed_token_ids": [1, 257]}, {"stop_token_ids": [257]}], ids=str
)
def test_tokens_of_parameters_are_tokens_of_the_model(own: dict[str, object]) -> None:
    (name,) = own
    sentence = f"line 3 of prompts.jsonl: {name} has token 257, but the model has 257 tokens"
    assert error({"prompt": "x", **own}).message == sentence
    assert error(request({"prompt": "x", **own}, COMPLETIONS)).message == sentence.replace(name, f"body.{name}")
    tokenizer = ByteTokenizer()
    tokenizer.vocabulary = 258
    assert prompt({"prompt": "x", **own}, tokenizer=tokenizer).params != SamplingParams()
