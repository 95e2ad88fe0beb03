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
from batchgen.types import Alternative, Details, Generation
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
    [
        ({"logprobs": True}, {"logprobs": True}),
        ({"logprobs": True, "top_logprobs": 0}, {"logprobs": True, "top_logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": True, "top_logprobs": 20}),
        ({"logprobs": False}, {"logprobs": False}),
        ({"logprobs": 0}, {"logprobs": False}),
        ({"prompt_logprobs": 3}, {"prompt_logprobs": 3}),
    ],
)
def test_a_chat_asks_for_logprobs(body: dict[str, object], expected: dict[str, object]) -> None:
    assert parse(line(**body)).sampling == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"logprobs": 0}, {"logprobs": True, "top_logprobs": 0}),
        ({"logprobs": 5}, {"logprobs": True, "top_logprobs": 5}),
        ({"logprobs": False}, {"logprobs": False}),
        ({"logprobs": None}, {}),
        ({"logprobs": 1, "echo": True}, {"logprobs": True, "top_logprobs": 1, "prompt_logprobs": 1}),
        (
            {"logprobs": 1, "echo": True, "prompt_logprobs": 4},
            {"logprobs": True, "top_logprobs": 1, "prompt_logprobs": 4},
        ),
        ({"echo": True, "max_tokens": 0}, {"max_new_tokens": 1}),
        ({"echo": True, "prompt": [1, 2]}, {"return_token_ids": True}),
        ({"echo": False}, {}),
    ],
)
def test_a_completion_asks_for_logprobs_with_a_number(body: dict[str, object], expected: dict[str, object]) -> None:
    assert parse(line(COMPLETIONS, **body)).sampling == expected


@pytest.mark.parametrize(
    ("url", "body", "complaint"),
    [
        (CHAT, {"logprobs": 3}, "body.logprobs must be true or false, not 3"),
        (CHAT, {"logprobs": "x"}, 'body.logprobs must be true or false, not "x"'),
        (CHAT, {"top_logprobs": 2}, "body.top_logprobs needs body.logprobs, which must be true"),
        (CHAT, {"echo": True}, "body.echo is not supported"),
        (COMPLETIONS, {"top_logprobs": 2}, "body.top_logprobs is not supported: it must be 0 or left out, not 2"),
        (COMPLETIONS, {"echo": 1}, "body.echo must be true or false, not 1"),
    ],
)
def test_what_does_not_ask_rightly_is_refused(url: str, body: dict[str, object], complaint: str) -> None:
    assert refused(line(url, **body)).message.startswith(complaint)


EURO = ["\udce2", "\udc82\udcac"]  # the three bytes of a euro sign, over two tokens


def done(request: Mapping[str, object], **details: Any) -> Generation:
    """A text of three tokens, the likeliest of each beside them where `top_logprobs` says so."""
    told = Details(token_texts=["Hi", *EURO], **details)
    return Generation(4, "r1", "Hi€", "stop", 9, 3, None, {}, request, [-0.5, -float("inf"), 0.0], told)


LIKELIEST = [
    [Alternative(5, "Ho", -0.25, 1), Alternative(6, "Hi", -0.5, 2)],
    # Two tokens that have no text of their own, and are shown alike.
    [Alternative(7, "\udcc3", -0.125, 1), Alternative(8, "\udc82", -2.0, 2)],
    [Alternative(9, EURO[1], 0.0, 1), Alternative(5, "Ho", -8.0, 2)],
]


def body_of(generation: Generation, shape: Shape = "openai") -> Any:
    written = json.loads(json.dumps(answer(generation, "m", 1763860000, shape), allow_nan=False))
    return written["response"]["body"]


@pytest.mark.parametrize("shape", ["openai", "vllm"])
def test_logprobs_of_a_chat_parse_with_the_openai_package(shape: Shape) -> None:
    body = ChatCompletion.model_validate(body_of(done(line(), top_logprobs=LIKELIEST), shape), strict=True)
    found = body.choices[0].logprobs
    assert isinstance(found, ChoiceLogprobs)
    assert found.content is not None
    assert [(each.token, each.logprob, each.bytes) for each in found.content] == [
        ("Hi", -0.5, list(b"Hi")),
        ("\ufffd", -9999.0, [0xE2]),
        ("\ufffd\ufffd", 0.0, [0x82, 0xAC]),
    ]
    assert b"".join(bytes(each.bytes or []) for each in found.content) == "Hi€".encode()
    top = [[(each.token, each.logprob, each.bytes) for each in one.top_logprobs] for one in found.content]
    assert top[0] == [("Ho", -0.25, list(b"Ho")), ("Hi", -0.5, list(b"Hi"))]
    assert top[1] == [("\ufffd", -0.125, [0xC3]), ("\ufffd", -2.0, [0x82])]


@pytest.mark.parametrize("shape", ["openai", "vllm"])
def test_logprobs_of_a_completion_parse_with_the_openai_package(shape: Shape) -> None:
    for likeliest, expected in (
        (None, [{"Hi": -0.5}, {"\ufffd": -9999.0}, {"\ufffd\ufffd": 0.0}]),
        (LIKELIEST, [{"Hi": -0.5, "Ho": -0.25}, {"\ufffd": -0.125}, {"\ufffd\ufffd": 0.0, "Ho": -8.0}]),
    ):
        body = body_of(done(line(COMPLETIONS), top_logprobs=likeliest), shape)
        found = Completion.model_validate(body, strict=True).choices[0].logprobs
        assert found is not None
        assert (found.tokens, found.text_offset) == (["Hi", "\ufffd", "\ufffd\ufffd"], [0, 2, 2])
        assert found.token_logprobs == [-0.5, -9999.0, 0.0]
        assert found.top_logprobs == expected


OF_THE_PROMPT = [
    None,
    [Alternative(2, "b", -1.0, 3), Alternative(3, "c", -0.5, 1)],
]


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [1, 2], [[1, 2]]])
def test_an_echo_is_the_prompt_and_its_logprobs(prompt: object) -> None:
    asked = line(COMPLETIONS, prompt=prompt, echo=True, logprobs=1, max_tokens=3)
    ids: dict[str, Any] = {"token_ids": [5, 6, 7], "prompt_token_ids": [1, 2]}
    told = {"prompt_logprobs": OF_THE_PROMPT, "prompt_token_texts": ["a", "b"], "top_logprobs": LIKELIEST, **ids}
    [choice] = body_of(done(asked, **told))["choices"]
    assert choice["text"] == "abHi€"
    assert choice["logprobs"]["tokens"] == ["a", "b", "Hi", "\ufffd", "\ufffd\ufffd"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 4, 4]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -0.5, -9999.0, 0.0]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"b": -1.0, "c": -0.5}]
    assert not {"prompt_logprobs", "token_ids", "prompt_token_ids"} & choice.keys()


def test_an_echo_without_a_text_has_the_prompt_alone() -> None:
    asked = line(COMPLETIONS, prompt=[1, 2], echo=True, logprobs=1, max_tokens=0)
    told: dict[str, Any] = {"prompt_logprobs": OF_THE_PROMPT, "prompt_token_texts": ["a", "b"]}
    body = body_of(done(asked, **told))
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert (choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]) == (["a", "b"], [None, -1.0])
    assert (body["usage"]["completion_tokens"], body["usage"]["total_tokens"]) == (0, 9)


def test_what_a_harness_reads_of_scores() -> None:
    """lm-evaluation-harness: context and continuation as ids, one token generated, scores read by place."""
    asked = line(COMPLETIONS, prompt=[[1, 2]], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234)
    told = Details(
        token_texts=["x"],
        prompt_logprobs=[None, [Alternative(3, "c", -0.5, 1)]],
        prompt_token_texts=["a", "c"],
        top_logprobs=[[Alternative(4, "x", -0.25, 1)]],
    )
    made = Generation(4, "r1", "x", "length", 2, 1, None, {}, asked, [-0.25], told)
    found = body_of(made)["choices"][0]["logprobs"]
    context = 1
    assert found["token_logprobs"][context:-1] == [-0.5]
    pairs = zip(found["tokens"][context:-1], found["top_logprobs"][context:-1], strict=True)
    assert all(token == max(top, key=top.get) for token, top in pairs)


def test_vllms_prompt_logprobs_and_token_ids_stand_where_vllm_has_them() -> None:
    told: dict[str, Any] = {"prompt_logprobs": OF_THE_PROMPT, "token_ids": [5, 6, 7], "prompt_token_ids": [1, 2]}
    expected = [
        None,
        {
            "2": {"logprob": -1.0, "rank": 3, "decoded_token": "b"},
            "3": {"logprob": -0.5, "rank": 1, "decoded_token": "c"},
        },
    ]
    chat = body_of(done(line(prompt_logprobs=1, return_token_ids=True), **told), "vllm")
    ChatCompletion.model_validate(chat, strict=True)
    assert (chat["prompt_logprobs"], chat["prompt_token_ids"]) == (expected, [1, 2])
    assert chat["choices"][0]["token_ids"] == [5, 6, 7]
    [choice] = body_of(done(line(COMPLETIONS, prompt_logprobs=1, return_token_ids=True), **told), "vllm")["choices"]
    assert (choice["prompt_logprobs"], choice["prompt_token_ids"]) == (expected, [1, 2])
    assert choice["token_ids"] == [5, 6, 7]


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
