"""Calls that must be made and thinking that must end, with a model of random weights, in each engine alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice

from batchgen import Host, RunSettings, run
from tests import tiny_models as models
from tests.commands.starts import ENVIRONMENT, read_rows, write_rows

# It thinks, unless it is told not to; the prompt begins the thinking.
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}[assistant]"
    "{% if add_generation_prompt %}<think>{% if enable_thinking is false %}</think>{% endif %}{% endif %}"
)
CITIES = {"type": "object", "properties": {"city": {"enum": ["Bonn", "Köln"]}}, "required": ["city"]}
STRICT = CITIES | {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": STRICT}} for name in ("weather", "population")]
NAMED = {"type": "function", "function": {"name": "weather"}}


def body(**given: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Rain?"}]
    return {"messages": messages, "max_tokens": 600, "temperature": 1.0, "thinking_token_budget": 5, **given}


BODIES = {
    "required": body(tools=TOOLS, tool_choice="required", parallel_tool_calls=False),
    "several": body(tools=TOOLS, tool_choice="required", n=3),
    "named": body(tools=TOOLS, tool_choice=NAMED),
    "regex": body(structured_outputs={"regex": "Yes|No"}, n=2, stop=["e"]),
    "at once": body(structured_outputs={"regex": "Yes|No"}, chat_template_kwargs={"enable_thinking": False}),
    "cut": body(max_tokens=3),
    "hidden": body(structured_outputs={"regex": "Yes|No"}, include_reasoning=False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = models.save(
        tmp_path_factory.mktemp("thinker"), models.llama, initializer_range=0.3, max_position_embeddings=2048
    )
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module", params=["accelerate", "paged"])
def answers(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ChatCompletion]:
    place = tmp_path_factory.mktemp(request.param)
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": each}
        for name, each in BODIES.items()
    ]
    settings = RunSettings(engine=request.param, model=str(folder), dtype="float32")
    out = run(str(write_rows(place / "in.jsonl", lines)), place / "out", settings, host=Host(ENVIRONMENT)).folder
    return {
        row["custom_id"]: ChatCompletion.model_validate(row["response"]["body"], strict=True)
        for row in read_rows(out / "generations.jsonl")
    }


def calls(choice: Choice) -> list[tuple[str, Any]]:
    made = [call for call in choice.message.tool_calls or [] if call.type == "function"]
    return [(call.function.name, json.loads(call.function.arguments)) for call in made]


def test_calls_that_must_be_made_are_made_by_their_schemas(answers: dict[str, ChatCompletion]) -> None:
    for name in ("required", "several", "named"):
        for choice in answers[name].choices:
            assert choice.finish_reason == ("stop" if name == "named" else "tool_calls")
            assert choice.message.content is None
            made = calls(choice)
            assert made
            assert len(made) == 1 or name == "several"
            for function, arguments in made:
                assert function == "weather" or (function == "population" and name != "named")
                jsonschema.validate(arguments, CITIES)
    ids = [call.id for name in answers for choice in answers[name].choices for call in choice.message.tool_calls or []]
    assert len(ids) == len(set(ids)) >= 5


def test_thinking_ends_at_its_budget_and_the_answer_follows(answers: dict[str, ChatCompletion]) -> None:
    for name, thought in (("regex", 10), ("hidden", 5)):
        usage = answers[name].usage
        assert usage is not None
        assert usage.completion_tokens_details is not None
        assert usage.completion_tokens_details.reasoning_tokens == thought
        for choice in answers[name].choices:
            # A stop text counts in the answer alone.
            assert choice.message.content in (("Y", "No") if name == "regex" else ("Yes", "No"))
            assert bool((choice.message.model_extra or {}).get("reasoning_content")) is (name == "regex")


def test_a_prompt_that_has_ended_the_thinking_is_answered_at_once(answers: dict[str, ChatCompletion]) -> None:
    answer = answers["at once"]
    assert answer.choices[0].message.content in ("Yes", "No")
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 4
    assert answer.usage.completion_tokens_details is None


def test_a_text_that_was_cut_in_its_thinking_has_no_content(answers: dict[str, ChatCompletion]) -> None:
    [choice] = answers["cut"].choices
    assert (choice.finish_reason, choice.message.content) == ("length", None)


def test_engines_say_the_same(folder: Path, answers: dict[str, ChatCompletion]) -> None:
    said = {name: [choice.model_dump() for choice in answer.choices] for name, answer in answers.items()}
    assert _SAID.setdefault(folder, said) == said


_SAID: dict[Path, dict[str, Any]] = {}
