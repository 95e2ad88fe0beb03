"""The sampling that a model's author recommends: what is taken of it, what wins over it, and how runs go on."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from batchgen import RunSettings
from batchgen.checkpoint import DifferentRun, RunFolder, read_json, to_json
from batchgen.commands import main
from batchgen.engine import EngineError
from batchgen.files import write_atomic
from batchgen.models.generation_config import with_authors_sampling
from batchgen.requests.prompts import PromptReader
from batchgen.requests.recipe import Recipe
from batchgen.runs.flow import Host, run
from batchgen.types import Prompt, SamplingParams
from tests.byte_tokenizer import ByteTokenizer, request, rows
from tests.commands.starts import ENVIRONMENT, read_rows, write_rows

HELLO = [{"role": "user", "content": "Hello"}]
AUTHORS = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": 2}


def folder(path: Path, **values: object) -> str:
    path.mkdir(exist_ok=True)
    (path / "generation_config.json").write_text(json.dumps(values))
    return str(path)


def sampling(recipe: Recipe, model: str) -> dict[str, Any]:
    found = with_authors_sampling(recipe, model, say=False).sampling
    names = ("temperature", "top_p", "top_k", "max_new_tokens", "min_p", "repetition_penalty")
    return {name: getattr(found, name) for name in names}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {}),
        (AUTHORS, {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
        (AUTHORS | {"do_sample": False}, {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"min_p": 0.1}, {"temperature": 1.0, "min_p": 0.1}),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"top_k": -1, "temperature": None}, {"temperature": 1.0, "top_k": 0}),
        ({"top_k": 50.0}, {"temperature": 1.0, "top_k": 50}),
        ({"max_new_tokens": 300}, {"max_new_tokens": 300}),
        ({"do_sample": True, "max_length": 20}, {}),
    ],
)
def test_what_vllm_takes_is_taken(tmp_path: Path, values: dict[str, Any], expected: dict[str, Any]) -> None:
    model = folder(tmp_path / "model", **values)
    defaults = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 128, "min_p": 0.0}
    defaults["repetition_penalty"] = 1.0
    assert sampling(Recipe(generation_config="auto"), model) == defaults | expected
    assert sampling(Recipe(), model) == defaults
    assert sampling(Recipe(generation_config=model), str(tmp_path)) == defaults | expected


def test_what_the_recipe_chooses_wins_the_default_too(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", **AUTHORS)
    other = Recipe(sampling=SamplingParams(top_p=0.5), generation_config="auto", set_by_user=frozenset({"temperature"}))
    found = with_authors_sampling(other, model, say=False).sampling
    assert (found.temperature, found.top_p, found.top_k) == (0.0, 0.5, 20)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"temperature": "warm"}, 'temperature must be a number from 0 to 100, not "warm"'),
        ({"temperature": True}, "temperature must be a number from 0 to 100, not true"),
        ({"temperature": -1}, "temperature must be a number"),
        ({"top_p": [0.9]}, "top_p must be a number above 0 and at most 1, not a list"),
        ({"top_k": 1.5}, "top_k must be a whole number, 0 (off) or more, not 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, 1 or more, not 0"),
        ({"temperature": {"a": 1}}, "temperature must be a number from 0 to 100, not an object"),
    ],
)
def test_a_value_that_is_none_is_a_sentence_with_file_and_field(
    tmp_path: Path, values: dict[str, Any], complaint: str
) -> None:
    model = folder(tmp_path / "model", **values)
    with pytest.raises(EngineError) as caught:
        with_authors_sampling(Recipe(generation_config="auto"), model, say=False)
    assert str(caught.value).startswith(f"{model}/generation_config.json: {complaint}")
    assert "--generation-config none" in str(caught.value)
    assert with_authors_sampling(Recipe(), model, say=False) == Recipe()


def test_a_folder_without_the_file_is_a_sentence_and_a_model_without_it_is_none(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"there is no .*/generation_config\.json: --generation-config must be auto"):
        with_authors_sampling(Recipe(generation_config=str(tmp_path)), "", say=False)
    assert sampling(Recipe(generation_config="auto"), str(tmp_path)) == sampling(Recipe(), "")


def test_what_is_taken_and_what_cannot_be_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unknown = {"length_penalty": 1.05, "min_p": 0, "typical_p": 1.0, "num_beams": 4, "stop_strings": ["x"]}
    model = folder(tmp_path / "model", **AUTHORS, **unknown)
    with caplog.at_level(logging.INFO):
        with_authors_sampling(Recipe(generation_config="auto"), model, say=True)
    taken, left = [record.getMessage() for record in caplog.records]
    assert taken.endswith(
        f"is taken from {model}/generation_config.json: temperature 0.6, top_p 0.95, top_k 20, min_p 0"
    )
    assert left.startswith(f"{model}/generation_config.json sets length_penalty, num_beams, stop_strings, which")


def read(recipe: Recipe, body: dict[str, Any], context: int | None = None) -> Prompt:
    [prompt] = PromptReader(recipe, ByteTokenizer(context), {}).read(rows(request({"messages": HELLO, **body})))
    assert isinstance(prompt, Prompt), prompt
    return prompt


def test_a_body_wins_over_the_author_and_the_authors_length_goes_as_far_as_the_context(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", **AUTHORS, max_new_tokens=1000)
    recipe = with_authors_sampling(Recipe(generation_config="auto"), model, say=False)
    params = read(recipe, {"temperature": 0, "top_k": -1, "max_tokens": 3}).params
    assert params == SamplingParams(max_new_tokens=3, temperature=0, top_p=0.95, top_k=0)
    length = len("<user>Hello")
    assert read(recipe, {}).params.max_new_tokens == 1000
    assert read(recipe, {}, context=length + 5).params.max_new_tokens == 5


def test_who_gets_a_greedy_answer_without_having_asked_is_told(caplog: pytest.LogCaptureFixture) -> None:
    told = 'neither the body nor generation_config.json sets "temperature": its answer is greedy'
    asked = Recipe(generation_config="auto", set_by_user=frozenset({"temperature"}))
    for recipe, body in ((Recipe(), {}), (asked, {}), (Recipe(generation_config="auto"), {"temperature": 0})):
        read(recipe, body)
    assert told not in caplog.text
    read(Recipe(generation_config="auto"), {})
    assert told in caplog.text


def test_what_is_used_is_recorded_and_compared_and_a_run_from_before_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine that echoes has no model, so the file is that of a folder."""
    lines = write_rows(tmp_path / "in.jsonl", [{"custom_id": "a", **request({"messages": HELLO, "model": "m"})}])
    authors = folder(tmp_path / "authors", **AUTHORS)

    def start(out: str, generation_config: str) -> dict[str, Any]:
        recipe = Recipe(model="m", generation_config=generation_config)
        run(str(lines), tmp_path / out, RunSettings(recipe=recipe, engine="echo"), host=Host(ENVIRONMENT))
        return RunFolder(tmp_path / out).read_identity()

    asked = start("new", authors)
    assert (asked["sampling.temperature"], asked["sampling.top_k"], asked["generation_config"]) == (0.6, 20, authors)
    assert start("new", authors) == asked
    folder(tmp_path / "authors", **AUTHORS | {"temperature": 0.9})
    with pytest.raises(DifferentRun, match=r"sampling\.temperature was 0\.6, now 0\.9"):
        start("new", authors)

    old = start("old", authors)
    folder(tmp_path / "authors", **AUTHORS | {"temperature": 0.9, "min_p": 0.1, "repetition_penalty": 1.1})
    assert start("old", authors) == old  # as versions wrote it that knew neither
    assert start("both", authors)["sampling.repetition_penalty"] == 1.1
    folder(tmp_path / "authors", **AUTHORS | {"temperature": 0.9, "min_p": 0.1, "repetition_penalty": 1.2})
    with pytest.raises(DifferentRun, match=r"sampling\.repetition_penalty was 1\.1, now 1\.2"):
        start("both", authors)

    assert start("none", "none")["generation_config"] is None
    with pytest.raises(DifferentRun, match=r"generation_config was null, now \"auto\""):
        start("none", "auto")
    known = read_json(tmp_path / "none" / "run.json")
    del known["asked"]["generation_config"]  # as versions wrote it that knew no author
    write_atomic(tmp_path / "none" / "run.json", to_json(known))
    with caplog.at_level(logging.INFO):
        assert start("none", "auto") == known["asked"]
    assert "this run began without the model's generation_config.json, and goes on without it" in caplog.text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (0.6, 0.95, 20)),
        (["--temperature", "0"], (0.0, 0.95, 20)),
        (["--generation-config", "none"], (0.0, 1.0, 0)),
        (["--generation-config", "other"], (0.3, 1.0, 0)),
        (["--generation-config", "other", "--top-p", "1"], (0.3, 1.0, 0)),
    ],
)
def test_run_batch_takes_the_authors_sampling_and_a_typed_flag_wins(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    expected: tuple[float, float, int],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("batchgen.commands.log_to_stderr", lambda rank, size: None)
    shutil.copytree(tiny_llama, tmp_path / "model")
    folder(tmp_path / "model", **AUTHORS)
    folder(tmp_path / "other", temperature=0.3)
    write_rows(tmp_path / "in.jsonl", [{"custom_id": "a", **request({"messages": HELLO, "max_tokens": 1})}])
    words = ["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", "model", "--engine", "accelerate", *flags]
    ended = CliRunner().invoke(main, words)
    assert ended.exit_code == 0, ended.output
    asked = RunFolder(tmp_path / "out.jsonl.run").read_identity()
    assert tuple(asked[f"sampling.{name}"] for name in ("temperature", "top_p", "top_k")) == expected


@pytest.mark.parametrize(("flags", "expected"), [([], 0.0), (["--generation-config", "auto"], 0.6)])
def test_run_stays_greedy_unless_it_is_given(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: float
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("batchgen.commands.run.log_to_stderr", lambda rank, size: None)
    shutil.copytree(tiny_llama, tmp_path / "model")
    folder(tmp_path / "model", **AUTHORS)
    write_rows(tmp_path / "in.jsonl", [{"messages": HELLO}])
    words = ["run", "in.jsonl", "--model", "model", "--engine", "accelerate", "--dry-run", *flags]
    ended = CliRunner().invoke(main, words)
    assert ended.exit_code == 0, ended.output
    assert f'"temperature": {expected}' in ended.output


def test_answers_are_those_of_the_authors_sampling(tiny_llama: Path, tmp_path: Path) -> None:
    """A whole run, with a real model: the same answers as with the same values as flags."""
    lines = write_rows(tmp_path / "in.jsonl", [{"custom_id": "a", **request({"messages": HELLO, "max_tokens": 8})}])
    authors = folder(tmp_path / "authors", temperature=1.5, top_k=40)
    found = {}
    for name, recipe in (
        ("file", Recipe(generation_config=authors)),
        ("flags", Recipe(sampling=SamplingParams(temperature=1.5, top_k=40))),
        ("greedy", Recipe()),
    ):
        settings = RunSettings(recipe=recipe, model=str(tiny_llama), engine="accelerate", selftest=False)
        run(str(lines), tmp_path / name, settings, host=Host(ENVIRONMENT))
        [row] = read_rows(tmp_path / name / "generations.jsonl")
        found[name] = row["response"]["body"]["choices"]
    assert found["file"] == found["flags"] != found["greedy"]
