"""Answers to rows with several samples, and what else a row can ask to have beside its text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from batchgen import Host, RunSettings, run
from batchgen.requests.openai import Shape, answer
from batchgen.requests.output import RESULT, renderer
from batchgen.types import Alternative, Details, Generation
from tests.commands.starts import ENVIRONMENT, read_rows, write_rows
from tests.requests.test_openai_logprobs import CHAT, COMPLETIONS, line


def made(sample: int, **changed: Any) -> Generation:
    """One of three samples, the last of which was cut off."""
    reason: Any = "length" if sample == 2 else "stop"
    one = Generation(4, "r1", "abc"[sample], reason, 9, 2 + sample, None, {}, sample=sample)
    for name, value in changed.items():
        setattr(one, name, value)
    return one


def joined(**changed: Any) -> Generation:
    first = made(0, **changed)
    first.others = [made(sample, **changed) for sample in (1, 2)]
    return first


@pytest.mark.parametrize("shape", ["openai", "vllm"])
@pytest.mark.parametrize(("url", "model"), [(CHAT, ChatCompletion), (COMPLETIONS, Completion)])
def test_each_sample_is_a_choice_and_the_prompt_is_counted_once(url: str, model: Any, shape: Shape) -> None:
    written: Any = json.loads(json.dumps(answer(joined(request=line(url, n=3)), "m", 1763860000, shape)))
    body = model.model_validate(written["response"]["body"], strict=True)
    assert [choice.index for choice in body.choices] == [0, 1, 2]
    texts = [choice.text if url == COMPLETIONS else choice.message.content for choice in body.choices]
    assert texts == ["a", "b", "c"]
    assert [choice.finish_reason for choice in body.choices] == ["stop", "stop", "length"]
    assert (body.usage.prompt_tokens, body.usage.completion_tokens, body.usage.total_tokens) == (9, 9, 18)


def test_vllms_shape_says_what_has_ended_a_text() -> None:
    made_of = [made(0, request=line(n=3), details=Details(stop_reason=reason)) for reason in ("END", 7, None)]
    made_of[0].others = made_of[1:]
    for shape, expected in (("vllm", ["END", 7, None]), ("openai", None)):
        written: Any = answer(made_of[0], "m", 1, shape)
        choices = written["response"]["body"]["choices"]
        reasons = [choice["stop_reason"] for choice in choices if "stop_reason" in choice]
        assert reasons == (expected or [])


LINES: list[dict[str, Any]] = [
    line(COMPLETIONS, prompt=["hé", "xyz"], n=2, temperature=1, echo=True, max_tokens=2),
    line(COMPLETIONS, prompt=["hé", "xyz"], n=3, echo=True, max_tokens=9),
    line(COMPLETIONS, prompt=[[104, 195], [169]], echo=True, logprobs=1, max_tokens=1, return_token_ids=True),
    line(COMPLETIONS, prompt=["a", ""]),
]


def test_a_line_with_several_prompts_has_choices_for_each(tmp_path: Path) -> None:
    """The engine says the first tokens of each prompt once more."""
    lines = [{**each, "custom_id": str(number)} for number, each in enumerate(LINES)]
    source = str(write_rows(tmp_path / "in.jsonl", lines))
    out = run(source, tmp_path / "out", RunSettings(engine="echo"), host=Host(ENVIRONMENT)).folder
    sampled, greedy, ids, bad = (row["response"] for row in read_rows(out / "generations.jsonl"))
    body = Completion.model_validate(sampled["body"], strict=True)
    assert [choice.text for choice in body.choices] == ["héh\ufffd"] * 2 + ["xyzxy"] * 2
    assert body.usage is not None
    assert (body.usage.prompt_tokens, body.usage.completion_tokens) == (6, 8)
    assert [choice["text"] for choice in greedy["body"]["choices"]] == ["héhé"] * 3 + ["xyzxyz"] * 3
    assert greedy["body"]["usage"]["prompt_tokens"] == 6
    first, second = ids["body"]["choices"]
    assert (first["text"], first["logprobs"]["tokens"]) == ("h\ufffdh", ["h", "\ufffd", "h"])
    assert (second["prompt_token_ids"], second["token_ids"]) == ([169], [169])
    assert second["logprobs"]["token_logprobs"] == [None, 0.0]
    assert "body.prompt[1]: the prompt is empty" in bad["body"]["error"]["message"]
    [record] = read_rows(out / "timing.jsonl")
    assert record["prompt_tokens"] == 6 + 6 + 3


def plain(generation: Generation) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(renderer("m", 0, "openai", False)(generation))
    return row


def test_a_plain_row_has_all_its_texts() -> None:
    row = plain(joined())
    assert (row["text"], row["texts"]) == ("a", ["a", "b", "c"])
    assert (row["finish_reason"], row["finish_reasons"]) == ("stop", ["stop", "stop", "length"])
    assert (row["prompt_tokens"], row["generated_tokens"]) == (9, 9)
    assert list(row) == [*RESULT, "texts", "finish_reasons"]


def test_a_plain_row_has_what_it_asks_for_and_nothing_else() -> None:
    token = Alternative(7, "\udcc3", -0.5, 2)
    told = Details(
        token_texts=["a"],
        token_ids=[7],
        prompt_token_ids=[1, 2],
        top_logprobs=[[token]],
        prompt_logprobs=[None, [token]],
        stop_reason=7,
    )
    shown = {"token": 7, "text": "\ufffd", "logprob": -0.5, "rank": 2}
    expected: dict[str, Any] = {
        "logprobs": [-0.5],
        "top_logprobs": [[shown]],
        "prompt_logprobs": [None, [shown]],
        "token_ids": [7],
        "prompt_token_ids": [1, 2],
        "stop_reason": 7,
    }
    row = plain(made(0, logprobs=[-0.5], details=told, columns={"texts": "own", "token_ids": True}))
    own = {"input_texts": "own", "input_token_ids": True}
    assert {name: row[name] for name in row if name not in RESULT} == expected | own
    several = plain(joined(logprobs=[-0.5], details=told))
    assert (several["logprobs"], several["texts_logprobs"]) == ([-0.5], [[-0.5]] * 3)
    assert (several["token_ids"], several["texts_token_ids"]) == ([7], [[7]] * 3)
    assert set(plain(made(0, details=Details(token_texts=["a"], reasoning_tokens=0)))) == set(RESULT)


ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "hé", "top_logprobs": 2, "prompt_logprobs": 0},
    {"id": "b", "prompt": "hé", "return_token_ids": True},
    {"id": "c", "prompt": "hé"},
]
TOKEN = pa.struct([("token", pa.int64()), ("text", pa.string()), ("logprob", pa.float64()), ("rank", pa.int64())])
TYPES = {
    "logprobs": pa.list_(pa.float64()),
    "top_logprobs": pa.list_(pa.list_(TOKEN)),
    "prompt_logprobs": pa.list_(pa.list_(TOKEN)),
    "token_ids": pa.list_(pa.int64()),
    "prompt_token_ids": pa.list_(pa.int64()),
}


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_a_table_has_columns_of_what_its_rows_ask_for(tmp_path: Path, name: str) -> None:
    if name == "in.parquet":
        pq.write_table(
            pa.Table.from_pylist([{key: row.get(key) for key in {**ROWS[0], **ROWS[1]}} for row in ROWS]),
            tmp_path / name,
        )
    else:
        write_rows(tmp_path / name, ROWS)
    settings = RunSettings(engine="echo", output_format="parquet")
    out = run(str(tmp_path / name), tmp_path / "out", settings, host=Host(ENVIRONMENT)).folder
    table = pq.ParquetFile(out / "generations.parquet").read()
    assert table.schema.names[: len(RESULT) + len(TYPES)] == [*RESULT, *TYPES]
    assert {key: table.schema.field(key).type for key in TYPES} == TYPES
    first, second, third = table.to_pylist()
    assert (second["token_ids"], second["prompt_token_ids"]) == ([*"hé".encode()], [*"hé".encode()])
    assert (first["token_ids"], third["logprobs"]) == (None, None)
    assert first["top_logprobs"][0] == [{"token": 104, "text": "h", "logprob": 0.0, "rank": 1}]
    assert (first["prompt_logprobs"][0], len(first["prompt_logprobs"])) == (None, 3)
    lines = run(str(tmp_path / name), tmp_path / "lines", RunSettings(engine="echo"), host=Host(ENVIRONMENT)).folder
    rows = read_rows(lines / "generations.jsonl")
    assert [{key: row.get(key) for key in TYPES} for row in rows] == table.select([*TYPES]).to_pylist()
