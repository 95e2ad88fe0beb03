"""Which rows are request lines, and what a row is called."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from batchgen.requests.row_ids import are_requests, endpoint, is_request, row_id
from batchgen.types import RowError
from tests.byte_tokenizer import request, rows

BAD = RowError("malformed_json", "", 3)
LONE = {"custom_id": "t", "params": {}}
PLAIN = {"custom_id": "c", "prompt": "x"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([request({})], True),
        ([BAD, request({})], True),
        ([LONE, BAD, request({}), PLAIN], True),
        ([PLAIN, request({})], False),
        ([{"messages": []}, request({})], False),
        ([{"text": "x"}, request({})], False),
        ([LONE, LONE], False),
        ([BAD], False),
        ([], False),
    ],
)
def test_the_first_row_that_can_be_told_says_what_a_file_is(
    values: list[Mapping[str, object] | RowError], expected: bool
) -> None:
    assert are_requests(rows(*values)) is expected


def test_azure_leaves_the_version_out() -> None:
    assert endpoint("/chat/completions") == "/v1/chat/completions"
    assert endpoint("/completions") == "/v1/completions"
    assert endpoint("/v1/embeddings") == "/v1/embeddings"
    assert endpoint("/chat") == "/chat"
    assert is_request(request({}, "/chat/completions"))
    assert is_request({"custom_id": "a", "url": "/chat/completions"})
    assert not is_request({"url": "/home", "body": {}})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"custom_id": 7, "method": "POST", "url": "/v1/completions", "body": {}}, "7"),
        ({"custom_id": 7.0, "method": "POST", "url": "/v1/completions", "body": {}}, "7"),
        ({"custom_id": True, "method": "POST", "url": "/v1/completions", "body": {}}, "prompts.jsonl:3"),
        ({"custom_id": "", "method": "POST", "url": "/v1/completions", "body": {}}, "prompts.jsonl:3"),
        ({"custom_id": "t", "url": "/v1/completions"}, "t"),
        (BAD, "prompts.jsonl:3"),
    ],
)
def test_a_line_keeps_its_id_whatever_is_wrong_with_it(value: Mapping[str, object] | RowError, expected: str) -> None:
    assert row_id(rows(value)[0]) == expected
