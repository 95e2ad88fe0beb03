"""Requests in the manner of the examples of OpenAI's specification: each is answered, or refused as the manual says.

`openai_examples.jsonl` has them, each with what its refusal says; null where it is answered.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from batchgen import Host, RunSettings, run
from batchgen.commands import _sampling
from batchgen.requests import openai_constraints
from batchgen.requests.constraints import KINDS
from batchgen.requests.openai_keys import SAMPLING
from batchgen.types import PARAMS
from tests.commands.starts import ENVIRONMENT, read_rows, write_rows

HERE = Path(__file__).parent
EXAMPLES: list[dict[str, Any]] = read_rows(HERE / "openai_examples.jsonl")
MODELS: dict[str, Any] = {"/v1/chat/completions": ChatCompletion, "/v1/completions": Completion}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("examples")
    lines = [
        {"custom_id": each["name"], "method": "POST", "url": each["url"], "body": each["body"]} for each in EXAMPLES
    ]
    out = run(
        str(write_rows(folder / "in.jsonl", lines)), folder / "out", RunSettings(engine="echo"), host=Host(ENVIRONMENT)
    ).folder
    return read_rows(out / "generations.jsonl")


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=lambda number: EXAMPLES[number]["name"])
def test_an_example_is_answered_or_refused(number: int, answers: list[dict[str, Any]]) -> None:
    example, response = EXAMPLES[number], answers[number]["response"]
    if example["refused"] is None:
        assert response["status_code"] == 200, response
        body = MODELS[example["url"]].model_validate(response["body"], strict=True)
        asked = example["body"]
        prompts = (
            asked["prompt"] if isinstance(asked.get("prompt"), list) and isinstance(asked["prompt"][0], str) else [""]
        )
        assert [choice.index for choice in body.choices] == [*range(len(prompts) * asked.get("n", 1))]
        assert {choice.finish_reason for choice in body.choices} <= {"stop", "length"}
        assert (body.choices[0].logprobs is None) == (not asked.get("logprobs"))
        return
    assert response["status_code"] == 400
    assert example["refused"] in response["body"]["error"]["message"]


def test_the_manual_names_every_key_that_is_refused() -> None:
    page = (HERE.parents[1] / "docs/parameters.md").read_text(encoding="utf-8")
    refused = [each["refused"] for each in EXAMPLES if each["refused"]]
    keys = {sentence.split()[0] for sentence in refused if sentence.startswith("body.")}
    assert len(keys) > 5
    assert not [key for key in keys if f"`{key.removeprefix('body.')}`" not in page]
    assert not [line for line in refused if not line.startswith("body.") and line not in page]


def test_the_manual_has_every_parameter_and_its_option() -> None:
    page = (HERE.parents[1] / "docs/parameters.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
    of_rows, bodies, options = (
        {name for row in rows if len(row) > place for name in _quoted(row[place])} for place in range(3)
    )
    assert not PARAMS.union(KINDS) - of_rows
    assert not SAMPLING.keys() - bodies
    assert not openai_constraints.KEYS - {"guided_whitespace_pattern"} - bodies
    written = {name for option in options for name in option.split()[:1]}
    assert not {name for option in _sampling._OPTIONS for name in _flags(option)} - written


def _quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _flags(option: Any) -> list[str]:
    @click.command()
    @option
    def command() -> None:
        """Holds the option."""

    return [name for parameter in command.params for name in parameter.opts]
