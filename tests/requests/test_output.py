"""One generation as a line: every value that an input can hold becomes JSON."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
import uuid
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.requests.output import RESULT, carried, renderer
from batchgen.types import Generation, RowError


def generation(columns: Mapping[str, object], text: str | None = "text", error: RowError | None = None) -> Generation:
    return Generation(4, "a", text, None if error else "stop", 3, 2, error, columns)


def rendered(value: Generation) -> bytes:
    return renderer("m", 0, "openai", False)(value)


def column(value: object) -> Any:
    line = rendered(generation({"x": value}))
    return json.loads(line.decode(), parse_constant=pytest.fail)["x"]


def test_a_row_is_its_result_then_its_columns() -> None:
    line = rendered(generation({"topic": "é", "n": 1}))
    assert (
        line
        == (
            '{"id":"a","index":4,"text":"text","finish_reason":"stop","prompt_tokens":3,"generated_tokens":2,'
            '"error":null,"topic":"é","n":1}\n'
        ).encode()
    )


def test_logprobs_stand_before_the_columns_of_the_row_that_asked() -> None:
    asked = generation({"n": 1, "logprobs": True})
    asked.logprobs = [-0.5, math.nan]
    assert rendered(asked).endswith(b'"error":null,"logprobs":[-0.5,null],"n":1,"input_logprobs":true}\n')


def test_a_failed_row_keeps_its_columns() -> None:
    row = json.loads(rendered(generation({"n": 1}, None, RowError("too_long", "line 5 is too long", 5))))
    assert row["error"] == {"type": "too_long", "message": "line 5 is too long", "line": 5}
    assert (row["text"], row["finish_reason"], row["n"]) == (None, None, 1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (math.inf, None),
        ([1.5, -math.inf, {"y": (math.nan, "z")}], [1.5, None, {"y": [None, "z"]}]),
        (datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC), "2026-01-02T03:04:05.000006+00:00"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.time(3, 4), "03:04:00"),
        (datetime.timedelta(minutes=1, milliseconds=500), 60.5),
        (b"\xff\x00", base64.b64encode(b"\xff\x00").decode()),
        (bytearray(b"a"), "YQ=="),
        (memoryview(b"a"), "YQ=="),
        (decimal.Decimal("1.50"), "1.50"),
        (decimal.Decimal("NaN"), "NaN"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ({"when": datetime.date(2026, 1, 2), "x": math.nan}, {"when": "2026-01-02", "x": None}),
        ([("key", 1)], [["key", 1]]),
        (2**80, 2**80),
    ],
)
def test_what_json_has_no_type_for(value: object, expected: object) -> None:
    assert column(value) == expected


def test_half_a_surrogate_pair_survives() -> None:
    for text in ("\ud800", "\\\ud800", 'a"\udfff\\'):
        assert column(text) == text
    assert rendered(generation({}, text="\ud800")).isascii()


@pytest.mark.parametrize("letter", ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\0"])
def test_a_row_is_one_line_whatever_reads_it(letter: str) -> None:
    text = f"one{letter}two\\{letter}é"
    line = rendered(generation({letter: text}, text=text))
    assert len(line.decode().splitlines()) == len(line.splitlines()) == 1
    row = json.loads(line)
    assert row["text"] == row[letter] == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def test_the_id_is_the_result_s_own() -> None:
    row = json.loads(rendered(generation({"id": 7, "text": "t"})))
    assert row["id"] == "a"
    assert row["input_text"] == "t"
    assert len(row) == len(RESULT) + 1


@given(columns=st.dictionaries(st.text() | st.sampled_from(RESULT), json_values, max_size=6))
def test_columns_of_json_come_out_as_they_went_in(columns: dict[str, object]) -> None:
    columns.pop("id", None)
    row = json.loads(rendered(generation(columns)))
    names = carried(columns)
    assert {name: row[names[name]] for name in columns} == columns
    assert list(row)[: len(RESULT)] == list(RESULT)
    assert len(row) == len(RESULT) + len(columns)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["text", "n"], ["input_text", "n"]),
        (["input_text", "n"], ["input_text", "n"]),
        (["text", "input_text"], ["input_input_text", "input_text"]),
        (["input_text", "text", "input_input_text"], ["input_text", "input_input_input_text", "input_input_text"]),
        (["index", "error"], ["input_index", "input_error"]),
    ],
)
def test_no_column_is_lost_to_another_of_its_new_name(columns: list[str], expected: list[str]) -> None:
    assert list(carried(columns).values()) == expected
    row = json.loads(rendered(generation({name: name for name in columns})))
    assert [row[name] for name in expected] == columns


def test_openai_lines_get_openai_answers_and_unreadable_lines_of_such_a_file_too() -> None:
    request = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": {}}
    error = RowError("malformed_json", "line 3 is not valid JSON", 3)
    good = Generation(0, "r1", "text", "stop", 3, 2, None, {}, request)
    bad = Generation(2, "in.jsonl:3", None, None, 0, 0, error, {})
    answer = json.loads(renderer("m", 7, "openai", True)(good))
    assert answer["custom_id"] == "r1"
    assert answer["response"]["body"]["created"] == 7
    assert answer["response"]["body"]["choices"][0]["message"]["content"] == "text"
    assert json.loads(renderer("m", 7, "openai", True)(bad))["response"]["status_code"] == 400
    assert json.loads(renderer("m", 7, "openai", False)(bad))["index"] == 2
    assert json.loads(renderer("m", 7, "vllm", True)(bad))["error"] is not None
