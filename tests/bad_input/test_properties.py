"""Any bytes as any format, any values in any place, any template: no exception but a sentence, and no row vanishes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engines.echo import Echo
from batchgen.formats import InputError
from batchgen.formats.input import Input
from batchgen.requests.output import renderer
from batchgen.requests.prompts import PromptReader
from batchgen.requests.recipe import Recipe
from batchgen.requests.refusal import Refused
from batchgen.requests.row_ids import own_id
from batchgen.requests.template import compile_template
from batchgen.types import Generation, Row, RowError, SamplingParams
from tests import mutations
from tests.requests.test_prompts_of_any_row import JSON, NAMES

every_format = pytest.mark.parametrize("name", mutations.FORMATS)
often = settings(max_examples=40, deadline=None)


def read(content: bytes, name: str) -> list[Row] | str:
    """The rows, as the process that scanned the file reads them and as another one does; or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = mutations.write(Path(folder), name, content)
        refused = ""
        try:
            scanned = Input.open([str(path)], Path(folder, "cache"), scan=True)
            rows = list(scanned.rows(range(len(scanned))))
        except InputError as error:
            refused = str(error).replace(folder, "")
        if refused:
            assert name in refused
            return refused
        taken = Input.open([str(path)], Path(folder, "cache"), scan=False)
        assert repr(list(taken.rows(range(len(taken))))) == repr(rows)  # a NaN is not itself
        assert scanned.duplicates(own_id) == taken.duplicates(own_id)
    assert [row.index for row in rows] == list(range(len(scanned)))
    assert all(first.line < second.line for first, second in pairwise(rows))
    for row in rows:
        if isinstance(row.value, RowError):
            assert row.value.line == row.line
            assert row.value.message.startswith((f"line {row.line} of {name} ", f"row {row.line} of {name} "))
    return rows


def outcomes(rows: list[Row], recipe: Recipe) -> list[dict[str, Any]]:
    """What the echo makes of the rows, through the line that is written of each."""
    results = PromptReader(recipe, Echo.tokenizer(""), {}).read(rows)
    assert [result.index for result in results] == [row.index for row in rows]
    render = renderer("m", 0, "openai", False)
    found = []
    for row, result in zip(rows, results, strict=True):
        done = result if isinstance(result, Generation) else Generation.of(result, result.text, "stop", 1)
        line = render(done)
        assert line.count(b"\n") == 1
        found.append(json.loads(line, parse_constant=pytest.fail))
        if done.error is not None:
            assert done.error.line == row.line
            assert f"{row.line} of {row.source}" in done.error.message
    return found


@every_format
@given(content=st.binary(max_size=300))
@often
def test_any_bytes_are_rows_or_a_sentence(name: str, content: bytes) -> None:
    read(content, name)


@every_format
@given(seed=st.integers(0, 2**32))
@often
def test_a_good_file_that_was_damaged_is_rows_or_a_sentence(name: str, seed: int) -> None:
    random = Random(seed)
    rows = mutations.rows(random, random.randint(0, 20))
    whole = mutations.FORMATS[name](rows)
    damaged = mutations.mutate(random, whole)
    found = read(damaged, name)
    assert repr(read(damaged, name)) == repr(found)
    if isinstance(found, list):
        assert len(found) == len(rows) or damaged != whole
        assert repr(outcomes(found, Recipe())) == repr(outcomes(found, Recipe()))


GOOD = st.dictionaries(st.text(max_size=4), st.none() | st.integers() | st.text(max_size=9), max_size=3)
LINES = GOOD.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b""))


@given(lines=st.lists(LINES, max_size=8), end=st.sampled_from([b"\n", b"\r\n"]))
@often
def test_each_line_is_a_row_whatever_stands_around_it(lines: list[bytes], end: bytes) -> None:
    before, after = b'{"id":"before","prompt":"one"}', b'{"id":"after","prompt":"two"}'
    found = read(end.join([before, *lines, after]), "a.jsonl")
    assert isinstance(found, list)
    assert [row.line for row in found[1:-1]] == [number for number, line in enumerate(lines, 2) if line.strip()]
    assert [row.value for row in (found[0], found[-1])] == [json.loads(before), json.loads(after)]


REQUEST: dict[str, Any] = {
    "custom_id": "r",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5},
}
PLACES: list[tuple[str | int, ...]] = [
    *(("custom_id",), ("method",), ("url",), ("body",), ("body", "model"), ("body", "messages"), ("body", "stop")),
    *(("body", "messages", 0), ("body", "messages", 0, "role"), ("body", "messages", 0, "content")),
    *(("body", key) for key in ("max_tokens", "temperature", "n", "stream", "logprobs", "logit_bias", "tools", "seed")),
]


@given(value=JSON, place=st.sampled_from(PLACES), model=st.sampled_from([None, "m"]))
@settings(max_examples=150, deadline=None)
def test_any_value_in_any_place_of_a_request_is_answered(
    value: object, place: tuple[str | int, ...], model: str | None
) -> None:
    line = json.loads(json.dumps(REQUEST))
    part = line
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    rows = [Row(0, "a.jsonl", 1, line), Row(1, "a.jsonl", 2, REQUEST)]
    first, second = outcomes(rows, Recipe(model=model))
    assert second["response"]["status_code"] == 200
    if "response" in first:
        assert first["response"]["status_code"] in (200, 400, 404)


PIECES = st.sampled_from(
    [
        *("{{ ", " }}", "{% ", " %}", "for a in prompt", "endfor", "if ", "endif", "set x = "),
        *("'", '"', "(", ")", "[0]", ".y", "|", "upper", "join", "~", "+", "*", "**", "%", "//"),
        *("loop", "namespace()", "macro m()", "endmacro", "m()", "range(9)", "{#", "#}", "none", "not "),
        *("a", "prompt", "id", "x", "9" * 12, "0", ",", " ", "{", "%", "\n"),
        *("'%99999999d'", "center", "list", "dict(a=1)", "is ", "defined", "else", "recursive", "block b", "endblock"),
    ]
)  # fmt: skip


@given(
    template=st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join),
    rows=st.lists(st.dictionaries(NAMES, JSON, max_size=3), max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_any_template_is_refused_or_renders_or_refuses_rows(template: str, rows: list[Mapping[str, object]]) -> None:
    before = repr(rows)
    assert rendered(template, rows) == rendered(template, rows)
    assert repr(rows) == before
    if rendered(template, []) == []:
        read_rows = [Row(number, "a.jsonl", number + 1, row) for number, row in enumerate(rows)]
        outcomes(read_rows, Recipe(template=template, sampling=SamplingParams(max_new_tokens=1)))


def rendered(template: str, rows: list[Mapping[str, object]]) -> list[str] | str:
    """What becomes of each row, or why the template is none."""
    try:
        render = compile_template(template)
    except ValueError as error:
        return sentence(error, "--template ")
    found = []
    for row in rows:
        try:
            found.append(render(row))
        except Refused as refused:
            found.append(sentence(refused, "the template failed: "))
    return found


def sentence(error: Exception, begin: str) -> str:
    assert str(error).startswith(begin)
    return str(error)
