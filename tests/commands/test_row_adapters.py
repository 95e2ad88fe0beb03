"""Runs whose rows name adapters: their texts are those of a run for each adapter, whatever stops them."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import adapters
from tests.commands.starts import Started, batchgen, read_rows, recorded, until, write_rows
from tests.commands.starts import call as call_apart
from tests.commands.test_adapter import call

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
NAMES = ("sql", "law", "chat")
SETTINGS: dict[str, adapters.Settings] = {
    "sql": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 12},
    "law": adapters.CASES["llama"]["rank-stabilised, of several ranks and alphas"],
    "chat": {"target_modules": ["o_proj", "gate_proj"], "rank_pattern": {"o_proj": 17}},
}
MODEL = ("--model", "base", "--engine", "paged", "--dtype", "float32")
BY_ROW = (*MODEL, *(word for name in NAMES for word in ("--adapter", f"{name}={name}-lora")))


def make_rows() -> list[dict[str, Any]]:
    """60 rows, a quarter of them without an adapter, some sampled; all begin alike, and some are cut into chunks."""
    rows: list[dict[str, Any]] = []
    for number in range(60):
        row: dict[str, Any] = {
            "id": f"row-{number}",
            "prompt": f"A beginning of all the rows: {'x' * (number * 7 % 50)}",
        }
        row |= {"max_new_tokens": 10 + number % 25, "temperature": 0.9 if number % 3 == 0 else 0.0}
        row |= {"adapter": NAMES[number % 4 - 1]} if number % 4 else {}
        rows.append(row)
    return rows


class Made(NamedTuple):
    """The folder with everything, and the text of each row in a run of its adapter alone."""

    work: Path
    rows: list[dict[str, Any]]
    texts: dict[str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    work = tmp_path_factory.mktemp("rows")
    base = adapters.save_base(work / "base", "llama")
    for name in NAMES:
        adapters.save_adapter(base, work / f"{name}-lora", SETTINGS[name])
    rows, texts = make_rows(), {}
    write_rows(work / "in.jsonl", rows)
    for name in (None, *NAMES):
        own = [{**row, "adapter": None} for row in rows if row.get("adapter") == name]
        write_rows(work / f"of-{name}.jsonl", own)
        merged = () if name is None else ("--adapter", f"{name}-lora")
        ended = call(work, "run", f"of-{name}.jsonl", "-o", f"of-{name}", *MODEL, *merged)
        assert ended.code == 0, ended.err
        texts |= {row["id"]: row["text"] for row in read_rows(work / f"of-{name}" / "generations.jsonl")}
    assert len(texts) == len(rows)
    return Made(work, rows, texts)


def read_texts(out: Path) -> dict[str, str]:
    return {row["id"]: row["text"] for row in read_rows(out / "generations.jsonl")}


def test_a_run_has_the_texts_of_a_run_for_each_adapter(made: Made) -> None:
    tight = ("--batch-size", 9, "--set", "step_tokens=33")
    ended = call(made.work, "run", "in.jsonl", "-o", "out", *BY_ROW, *tight)
    assert ended.code == 0, ended.err
    assert read_texts(made.work / "out") == made.texts
    found = read_rows(made.work / "out" / "generations.jsonl")
    assert [row.get("adapter") for row in found] == [row.get("adapter") for row in made.rows]
    content = json.loads((made.work / "out" / "run.json").read_text())
    assert sorted(content["asked"]["adapters"]) == sorted(NAMES)
    assert content["first_start"]["adapter_folders"]["law"] == str(made.work / "law-lora")
    again = ("run", "in.jsonl", "-o", "out", *MODEL)
    assert call(made.work, *again, *reversed_pairs(BY_ROW[len(MODEL) :])).code == 0  # in another order
    for given in ((), ("--adapter", "sql-lora"), BY_ROW[len(MODEL) : -2], (*BY_ROW[len(MODEL) : -1], "chat=sql-lora")):
        refused = call(made.work, *again, *given)
        assert refused.code == 4
        assert "was asked differently: adapter" in refused.err


def reversed_pairs(words: tuple[str, ...]) -> list[str]:
    return [word for place in range(len(words) - 2, -1, -2) for word in words[place : place + 2]]


def test_a_killed_run_goes_on_with_them(made: Made) -> None:
    words = batchgen("run", "in.jsonl", "-o", "killed", *BY_ROW, "--batch-size", 2)
    out = made.work / "killed"
    with Started(words, made.work, ONE_THREAD) as process:
        until(lambda: recorded(out) > 3, process)
        process.send(signal.SIGKILL)
        process.end()
    assert recorded(out) < len(made.rows)
    ended = call(made.work, "run", "in.jsonl", "-o", "killed", *BY_ROW)
    assert ended.code == 0, ended.err
    assert read_texts(out) == made.texts


def test_a_column_of_parquet_names_them(made: Made) -> None:
    columns = {name: [row.get(name) for row in made.rows] for name in made.rows[0] | made.rows[1]}
    pq.write_table(pa.table(columns), made.work / "in.parquet")
    words = ("run", "in.parquet", "-o", "columns", *BY_ROW, "--output-format", "parquet")
    ended = call(made.work, *words)
    assert ended.code == 0, ended.err
    found = pq.read_table(made.work / "columns" / "generations.parquet").to_pylist()
    assert {row["id"]: row["text"] for row in found} == made.texts
    assert [row["adapter"] for row in found] == columns["adapter"]


def test_a_name_that_is_none_is_an_error_row(made: Made) -> None:
    request = {"method": "POST", "url": "/v1/completions"}
    write_rows(
        made.work / "names.jsonl",
        [
            {"id": "unknown", "prompt": "x", "adapter": "math"},
            {"id": "number", "prompt": "x", "adapter": 3},
            {"id": "base", "prompt": "x", "adapter": "base"},
            {"id": "empty", "prompt": "x", "adapter": ""},
            {"custom_id": "other", **request, "body": {"prompt": "x", "model": "math"}},
            {"custom_id": "the model", **request, "body": {"prompt": "x", "model": "base"}},
            {"custom_id": "no model", **request, "body": {"prompt": "x"}},
            {"custom_id": "adapted", **request, "body": {"prompt": "x", "model": "law"}},
            {"id": "good", "prompt": "x", "adapter": "law"},
        ],
    )
    ended = call(made.work, "run", "names.jsonl", "-o", "names", *BY_ROW, "--max-new-tokens", 12)
    assert ended.code == 3, ended.err
    found = {row.get("custom_id", row.get("id")): row for row in read_rows(made.work / "names" / "generations.jsonl")}
    sentence = 'the "adapter" column is "math", but this run\'s adapters are "sql", "law", "chat": write one of them'
    assert sentence in found["unknown"]["error"]["message"]
    assert found["unknown"]["error"]["type"] == "model_not_found"
    assert 'the "adapter" column must hold a text, not 3' in found["number"]["error"]["message"]
    for name in ("base", "empty"):
        assert "or null for the model without one" in found[name]["error"]["message"]
    assert found["other"]["response"]["status_code"] == 404
    answers = {name: found[name]["response"]["body"] for name in ("the model", "no model", "adapted")}
    assert [answer["model"] for answer in answers.values()] == ["base", "base", "law"]
    texts = [answer["choices"][0]["text"] for answer in answers.values()]
    assert texts[0] == texts[1] != texts[2] == found["good"]["text"]


def test_without_adapters_the_column_is_data(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(made.work / "data.jsonl", [{"prompt": "x", "adapter": "USB"}])
    ended = call(made.work, "run", "data.jsonl", "-o", "data", "--engine", "echo")
    assert ended.code == 0, ended.err
    assert 'the column "adapter" is carried along and changes no text' in caplog.text
    assert "--adapter NAME=FOLDER gives the run an adapter" in caplog.text
    assert read_rows(made.work / "data" / "generations.jsonl")[0]["adapter"] == "USB"


def test_auto_takes_an_engine_that_has_them(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    words = ("run", "in.jsonl", "-o", "auto", "--model", "base", *BY_ROW[len(MODEL) :], "--dry-run")
    ended = call(made.work, *words)
    assert ended.code == 0, ended.err
    assert "engine:   paged" in ended.out
    assert "no adapters by row (--adapter FOLDER merges one): accelerate" in ended.out
    assert f"adapter:  law = {made.work / 'law-lora'} sha256:" in ended.out
    ended = call(made.work, "plan", "in.jsonl", "--model", "base", *BY_ROW[len(MODEL) :])
    assert "--adapter sql=sql-lora --adapter law=law-lora" in ended.out.splitlines()[-1], ended.err
    assert "--engine paged" in ended.out.splitlines()[-1]
    assert "accelerate" not in ended.out
    assert "changes no text" not in caplog.text, "the adapter of a row does"


@pytest.mark.slow
def test_ranks_that_share_a_model_share_its_adapters(made: Made) -> None:
    tight = ("--tp", 2, "--set", "cache_tokens=256", "--set", "expected_share=0.05", "--set", "step_tokens=33")
    ended = call_apart(made.work, "run", "in.jsonl", "-o", "shared", *BY_ROW, *tight, environment=ONE_THREAD)
    assert ended.code == 0, ended.err
    assert read_texts(made.work / "shared") == made.texts


@pytest.mark.slow
@pytest.mark.parametrize("base", ["phi3", "bloom"])
def test_ranks_share_fused_layers_and_their_adapters(base: str, tmp_path: Path) -> None:
    settings: adapters.Settings = {"target_modules": "all-linear"}
    adapters.save_adapter(adapters.save_base(tmp_path / "base", base), tmp_path / "one", settings)
    write_rows(tmp_path / "in.jsonl", [{"prompt": "x" * number, "adapter": "one"} for number in range(1, 9)])
    write_rows(tmp_path / "plain.jsonl", [{"prompt": "x" * number} for number in range(1, 9)])
    words = (*MODEL, "--max-new-tokens", 16)
    assert call(tmp_path, "run", "plain.jsonl", "-o", "merged", *words, "--adapter", "one").code == 0
    by_row = ("run", "in.jsonl", "-o", "shared", *words, "--adapter", "one=one", "--tp", 2)
    ended = call_apart(tmp_path, *by_row, environment=ONE_THREAD)
    assert ended.code == 0, ended.err
    merged, shared = (read_rows(tmp_path / name / "generations.jsonl") for name in ("merged", "shared"))
    assert [row["text"] for row in shared] == [row["text"] for row in merged]
