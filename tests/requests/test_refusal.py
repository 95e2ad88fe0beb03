"""Values as sentences show them, and the parameters of a row."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from batchgen.requests.refusal import Refused, RowParams, check_encodable, quote, sampling_params
from batchgen.types import PARAMS, SamplingParams

HUGE = 10**5000  # more digits than Python writes


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ("a", '"a"'),
        ("ü\n\x1b", r'"ü\n\u001b"'),
        ("a" * 61, '"' + "a" * 57 + '..."'),
        (1.5, "1.5"),
        pytest.param(HUGE, "a number of many digits", id="huge"),
        ([], "an empty list"),
        ({"a": 1}, "an object"),
        (b"", "a value of type bytes"),
    ],
)
def test_values_are_shown_short_and_as_json_names_them(value: object, text: str) -> None:
    assert quote(value) == text


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("max_new_tokens", 0, "max_new_tokens must be a whole number, 1 or more, not 0"),
        ("max_new_tokens", 1.5, "max_new_tokens must be a whole number, 1 or more, not 1.5"),
        ("temperature", "hot", 'temperature must be a number from 0 to 100, not "hot"'),
        pytest.param(
            "temperature", HUGE, "temperature must be a number from 0 to 100, not a number of many", id="huge"
        ),
        ("top_p", float("nan"), "top_p must be a number above 0 and at most 1, not nan"),
        ("top_k", -2, "top_k must be a whole number, 0 (off) or more, not -2"),
        ("top_k", 10**20, "top_k must be below 2147483648, not 100000000000000000000"),
        ("max_new_tokens", 2.0**31, "max_new_tokens must be below 2147483648, not 2147483648.0"),
        ("seed", True, "seed must be a whole number, not true"),
        ("stop", [""], 'stop must be a text or a list of texts, none of them empty, not [""]'),
        ("logprobs", 0, "logprobs must be true or false, not 0"),
        ("repetition_penalty", 10**400, "repetition_penalty must be a number from 0.01 to 100, not a number of many"),
        ("presence_penalty", float("nan"), "presence_penalty must be a number from -2 to 2, not nan"),
        ("allowed_token_ids", [-1], "allowed_token_ids must be a list of token ids, not [-1]"),
        ("allowed_token_ids", [], "allowed_token_ids must have a token id in it, or be left out"),
        ("bad_words", ["a", 5], 'bad_words must be a list of texts, none of them empty, not ["a", 5]'),
        ("stop_token_ids", ["a"] * 6, "stop_token_ids must be a list of token ids, not a list"),
        ("logit_bias", {"05x": 1}, 'logit_bias: the key "05x" is no token id'),
        ("logit_bias", {"5": True}, "logit_bias: the bias of token 5 must be from -100 to 100, not true"),
        ("thinking_tokens", -2, "thinking_tokens must be a whole number, 0 or more, not -2"),
        ("stop", {}, "stop must be a text or a list of texts, none of them empty, not an empty object"),
    ],
)
def test_bad_parameter_names_field_rule_and_value(name: str, value: object, complaint: str) -> None:
    with pytest.raises(Refused) as caught:
        sampling_params(SamplingParams(), {name: value}, {})
    assert caught.value.type == "wrong_type"
    assert caught.value.message.startswith(complaint)


def test_parameter_is_named_as_the_row_spells_it() -> None:
    with pytest.raises(Refused, match=r"^body\.max_tokens must be a whole number, 1 or more, not 0$"):
        sampling_params(SamplingParams(), {"max_new_tokens": 0}, {"max_new_tokens": "body.max_tokens"})


def test_whole_float_is_a_whole_number_and_one_stop_text_a_list_of_one() -> None:
    given = {"max_new_tokens": 5.0, "seed": 2.0, "stop": "."}
    assert sampling_params(SamplingParams(top_k=4), given, {}) == SamplingParams(5, top_k=4, seed=2, stop=(".",))


@pytest.mark.parametrize(
    ("default", "given", "expected"),
    [
        (SamplingParams(top_k=4), {"top_k": -1.0}, SamplingParams()),
        (SamplingParams(seed=4), {"seed": -1}, SamplingParams(seed=4)),
        (SamplingParams(thinking_tokens=4), {"thinking_tokens": -1}, SamplingParams()),
        (SamplingParams(), {"top_logprobs": 2}, SamplingParams(logprobs=True, top_logprobs=2)),
        (SamplingParams(logprobs=True, top_logprobs=2), {"logprobs": False}, SamplingParams()),
        (SamplingParams(logprobs=True, top_logprobs=2), {"top_logprobs": 0}, SamplingParams(logprobs=True)),
        (
            SamplingParams(),
            {"logit_bias": {"7": 2, "05": -1.5, "6": None}},
            SamplingParams(logit_bias=((7, 2), (5, -1.5))),
        ),
        (
            SamplingParams(),
            {"stop_token_ids": [5.0], "bad_words": ["a"]},
            SamplingParams(stop_token_ids=(5,), bad_words=("a",)),
        ),
        (SamplingParams(), {"n": 2.0, "min_tokens": 3.0}, SamplingParams(n=2, min_tokens=3)),
    ],
)
def test_what_rows_write_becomes_parameters(
    default: SamplingParams, given: dict[str, object], expected: SamplingParams
) -> None:
    assert sampling_params(default, given, {}) == expected


def read_parameters(make: Callable[[dict[str, object]], SamplingParams], given: dict[str, object]) -> object:
    try:
        return make(given)
    except Refused as refused:
        return refused.message


def test_rows_that_follow_each_other_get_the_parameters_of_each_alone() -> None:
    default = SamplingParams(max_new_tokens=9, temperature=0.5)
    values = (1, 1.0, True, "1", 0, False, 0.0, -1, None, [1], [True], {"1": 1})
    rows = [{name: value} for name in sorted(PARAMS) for value in values]
    rows += [{"top_k": 2, "seed": 3}, {"seed": 3, "top_k": 2}, {"top_k": 3, "seed": 2}, {}]
    rows += [{"seed": number} for number in range(5000)]
    reader = RowParams(default)
    for given in [*rows, *rows[::-1]]:
        expected = read_parameters(lambda given: sampling_params(default, given, {}), given)
        assert repr(read_parameters(lambda given: reader.read(given, {}), given)) == repr(expected)


def test_text_that_utf8_cannot_hold_is_refused() -> None:
    check_encodable("ü😀")
    with pytest.raises(Refused, match="surrogate"):
        check_encodable("\ud83d")
