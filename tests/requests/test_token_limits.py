"""What a model can take of a prompt, with the folders of real ones; a run in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from batchgen import FIT, Recipe, RunSettings, SamplingParams, run
from batchgen.checkpoint import DifferentRun
from batchgen.commands.run import command
from batchgen.models.tokenizer import HfTokenizer
from batchgen.runs.flow import Host
from batchgen.runs.prepare import RunError
from tests.commands.starts import ENVIRONMENT, read_rows, write_rows

ALONE = Host(ENVIRONMENT)
SENTENCE = 'line 2 of a.jsonl: the prompt has token 260 ("[PAD]"), but the model has 260 tokens'


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer has one token more than its embedding, and whose context is 40 tokens."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[PAD]"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 40}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    chat = {"id": "d", "messages": [{"role": "user", "content": "a [PAD]"}], "max_new_tokens": 1}
    texts = [{"id": "a", "prompt": "Hello"}, {"id": "b", "prompt": "[PAD][PAD]"}, {"id": "c", "prompt": "x"}]
    return write_rows(tmp_path / "a.jsonl", [*texts, chat])


def test_a_token_beyond_the_embedding_is_an_error_row_and_found_by_strict(model: Path, rows: Path) -> None:
    asked: dict[str, Any] = {"model": str(model), "engine": "accelerate", "selftest": False}
    short = Recipe(sampling=SamplingParams(max_new_tokens=4))
    with pytest.raises(RunError, match="2 of 4 rows are bad") as caught:
        run(rows, rows.parent / "strict", RunSettings(recipe=short, strict=True, **asked), host=ALONE)
    assert SENTENCE in str(caught.value)
    assert run(rows, rows.parent / "out", RunSettings(recipe=short, **asked), host=ALONE).failed == 2
    good, bad, other, chat = read_rows(rows.parent / "out/generations.jsonl")
    assert (good["generated_tokens"], other["generated_tokens"]) == (4, 4)
    assert (bad["error"]["type"], bad["error"]["message"]) == ("unknown_token", SENTENCE)
    assert chat["error"]["message"] == SENTENCE.replace("line 2", "line 4")


def test_new_tokens_fit_the_context_and_that_is_what_the_run_is(model: Path, rows: Path) -> None:
    asked: dict[str, Any] = {"model": str(model), "engine": "accelerate", "selftest": False}
    out = rows.parent / "fit"
    run(rows, out, RunSettings(recipe=Recipe(sampling=SamplingParams(max_new_tokens=FIT)), **asked), host=ALONE)
    for row in (one for one in read_rows(out / "generations.jsonl") if one["error"] is None):
        ended = row["finish_reason"] == "stop"
        assert ended or row["prompt_tokens"] + row["generated_tokens"] == 40
    assert json.loads((out / "run.json").read_text())["asked"]["sampling.max_new_tokens"] == "fit"
    with pytest.raises(DifferentRun, match=r"sampling.max_new_tokens was \"?fit"):
        run(rows, out, RunSettings(recipe=Recipe(sampling=SamplingParams(max_new_tokens=34)), **asked), host=ALONE)


def test_a_model_without_a_limit_of_its_context_wants_a_number(rows: Path) -> None:
    with pytest.raises(RunError, match=r"states no limit of its context\. Give a number"):
        run(
            rows,
            rows.parent / "out",
            RunSettings(recipe=Recipe(sampling=SamplingParams(max_new_tokens=FIT)), engine="echo"),
        )


def test_fit_is_a_number_of_tokens_to_the_command(rows: Path) -> None:
    assert command.make_context("run", [str(rows), "--max-new-tokens", "fit"]).params["max_new_tokens"] == FIT


def test_every_token_has_a_name_or_none(model: Path) -> None:
    tokenizer = HfTokenizer(str(model))
    names = [tokenizer.token_name(token) for token in (260, 261, 2**31, 2**40, 2**70)]
    assert names == ["[PAD]", None, None, None, None]
