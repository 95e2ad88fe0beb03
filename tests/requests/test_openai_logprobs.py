"""Log-probabilities of the generated tokens: asked for row by row, answered in both formats, kept by a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import ChoiceLogprobs

from batchgen import Host, Recipe, RunSettings, SamplingParams, run
from batchgen.checkpoint import CheckpointError
from batchgen.requests.openai import Shape, answer, parse
from batchgen.requests.openai_completions import CHAT, COMPLETIONS
from batchgen.requests.refusal import Refused
from batchgen.types import Details, Generation
from tests.commands.starts import ENVIRONMENT, read_rows, write_rows

ALONE = Host(ENVIRONMENT)


def line(url: str = CHAT, **body: object) -> dict[str, object]:
    given = {"messages": [{"role": "user", "content": "Hello"}]} if url == CHAT else {"prompt": "x"}
    return {"custom_id": "r1", "method": "POST", "url": url, "body": given | body}


def refused(value: Mapping[str, object]) -> Refused:
    with pytest.raises(Refused) as caught:
        parse(value)
    return caught.value


@pytest.mark.parametrize(
    ("body", "expected"),
    [({"logprobs": True}, True), ({"logprobs": True, "top_logprobs": 0}, True), ({"logprobs": False}, False)],
)
def test_a_chat_asks_for_logprobs(body: dict[str, object], expected: bool) -> None:
    assert parse(line(**body)).sampling == {"logprobs": expected}
    assert refused(line(**body | {"top_logprobs": 2})).message == (
        "body.top_logprobs is not supported: it must be 0 or left out, not 2"
    )


@pytest.mark.parametrize(
    ("value", "expected"), [(0, {"logprobs": True}), (False, {"logprobs": False}), (None, {}), (3, None), (True, None)]
)
def test_a_completion_asks_for_logprobs_with_a_number(value: object, expected: dict[str, object] | None) -> None:
    request = line(COMPLETIONS, logprobs=value)
    if expected is not None:
        assert parse(request).sampling == expected
        return
    problem = refused(request)
    assert problem.type == "unknown_parameter"
    assert "body.logprobs is not supported: it must be 0, which gives those of the generated tokens" in problem.message


def done(request: Mapping[str, object]) -> Generation:
    logprobs, texts = [-0.5, -float("inf"), 0.0], ["Hi", " ü", "</s>"]
    return Generation(4, "r1", "Hi ü", "stop", 9, 3, None, {}, request, logprobs, Details(token_texts=texts))


@pytest.mark.parametrize("shape", ["openai", "vllm"])
def test_logprobs_of_a_chat_parse_with_the_openai_package(shape: Shape) -> None:
    written = json.loads(json.dumps(answer(done(line()), "m", 1763860000, shape), allow_nan=False))
    body = ChatCompletion.model_validate(written["response"]["body"], strict=True)
    found = body.choices[0].logprobs
    assert isinstance(found, ChoiceLogprobs)
    assert found.content is not None
    assert [(one.token, one.logprob, one.top_logprobs) for one in found.content] == [
        ("Hi", -0.5, []),
        (" ü", -9999.0, []),
        ("</s>", 0.0, []),
    ]
    assert found.content[1].bytes == list(" ü".encode())


@pytest.mark.parametrize("shape", ["openai", "vllm"])
def test_logprobs_of_a_completion_parse_with_the_openai_package(shape: Shape) -> None:
    written = answer(done(line(COMPLETIONS)), "m", 1763860000, shape)
    response = json.loads(json.dumps(written))["response"]
    found = Completion.model_validate(response["body"], strict=True).choices[0].logprobs
    assert found is not None
    assert (found.tokens, found.text_offset) == (["Hi", " ü", "</s>"], [0, 2, 4])
    assert found.token_logprobs == [-0.5, -9999.0, 0.0]
    assert found.top_logprobs == [{"Hi": -0.5}, {" ü": -9999.0}, {"</s>": 0.0}]


ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "hé", "logprobs": True},
    {"id": "b", "prompt": "hé"},
    {"id": "c", "prompt": "hé", "logprobs": [-1.5]},
    {"id": "d", "prompt": "hé", "logprobs": 1},
    line(logprobs=True, max_tokens=2),
]


def test_a_run_gives_them_to_the_rows_that_ask(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    out = run(str(source), tmp_path / "out", RunSettings(engine="echo"), host=ALONE).folder
    asked, other, fed, wrong, chat = read_rows(out / "generations.jsonl")
    assert (asked["logprobs"], asked["generated_tokens"], asked["input_logprobs"]) == ([0.0] * 3, 3, True)
    assert "logprobs" not in other
    assert ("logprobs" in fed, fed["input_logprobs"], fed["error"]) == (False, [-1.5], None)
    assert wrong["error"]["message"] == "line 4 of in.jsonl: logprobs must be true or false, not 1"
    body = ChatCompletion.model_validate(chat["response"]["body"], strict=True)
    assert isinstance(body.choices[0].logprobs, ChoiceLogprobs)
    assert [one.token for one in body.choices[0].logprobs.content or []] == ["u", "s"]


def test_lines_of_rows_that_do_not_ask_stay_as_they_are_beside_others(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": str(n), "prompt": "x" * n} for n in range(1, 5)]
    asking = [row | {"logprobs": True} if n % 2 else row for n, row in enumerate(rows)]
    found = []
    for name, some in (("plain", rows), ("asking", asking)):
        source = write_rows(tmp_path / f"{name}.jsonl", some)
        out = run(str(source), tmp_path / name, RunSettings(engine="echo"), host=ALONE).folder
        found.append((out / "generations.jsonl").read_bytes().splitlines()[::2])
    assert found[0] == found[1]


def test_a_run_from_before_there_were_any_goes_on_and_asks_for_none(tmp_path: Path) -> None:
    source = str(write_rows(tmp_path / "in.jsonl", ROWS[1:2]))
    run(source, tmp_path / "out", RunSettings(engine="echo"), host=ALONE)
    assert "sampling.logprobs" not in json.loads((tmp_path / "out/run.json").read_text())["asked"]
    asking = Recipe(sampling=SamplingParams(logprobs=True))
    with pytest.raises(CheckpointError, match=r"sampling\.logprobs was not set, now true"):
        run(source, tmp_path / "out", RunSettings(recipe=asking, engine="echo"), host=ALONE)
    out = run(source, tmp_path / "new", RunSettings(recipe=asking, engine="echo"), host=ALONE).folder
    assert read_rows(out / "generations.jsonl")[0]["logprobs"] == [0.0] * 3


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_a_table_has_a_column_of_them_if_a_row_has_asked(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = [{"id": "a", "prompt": "x", "n": 1, "logprobs": None}, {"id": "b", "prompt": "xy"}]
    for asks in (False, True):
        rows[1]["logprobs"] = asks or None
        folder = tmp_path / str(asks)
        folder.mkdir()
        if name == "in.parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / name)
        else:
            write_rows(folder / name, rows)
        out = run(
            str(folder / name), folder / "out", RunSettings(engine="echo", output_format="parquet"), host=ALONE
        ).folder
        table = pq.ParquetFile(out / "generations.parquet").read()
        assert ("logprobs" in table.schema.names) == asks
    assert table.schema.names[6:8] == ["error", "logprobs"]
    assert table.schema.field("logprobs").type == pa.list_(pa.float64())
    assert table["logprobs"].to_pylist() == [None, [0.0, 0.0]]
    assert table["input_logprobs"].to_pylist() == [None, True]
