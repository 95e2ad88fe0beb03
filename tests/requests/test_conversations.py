"""Rows with messages through templates in the manner of many families: what is rendered, what may be written then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from batchgen.models.tokenizer import HfTokenizer
from batchgen.requests.prompts import PromptReader
from batchgen.requests.recipe import Recipe
from batchgen.requests.thinking import HARMONY
from batchgen.requests.tools import NAMED, REQUIRED
from batchgen.types import Generation, Prompt, Row, SamplingParams
from tests.byte_tokenizer import request
from tests.conversations import TOOL, family, save

MESSAGES = [{"role": "user", "content": "Rain?"}]
# Small templates in the manner of families that have none in tests/chat_templates.
_TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
_OWN = {
    "coder": "{% for t in tools or [] %}<tool>{{ t.function.name }}</tool>{% endfor %}" + _TURNS
    + "{% for m in messages %}{% for c in m.tool_calls or [] %}<tool_call><function={{ c.function.name }}>"
    "{% for k, v in c.function.arguments | items %}<parameter={{ k }}>{{ v }}</parameter>{% endfor %}"
    "</function></tool_call>{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]<think>\n{% endif %}",
    "seed": _TURNS + "{% if add_generation_prompt %}[assistant]{% if thinking_budget == 0 %}<seed:think></seed:think>"
    "{% endif %}{% endif %}",
    "pythonic": "{% if tools %}{{ tools | tojson }}[func_name1(params_name1=params_value1)]{% endif %}" + _TURNS
    + "{% if add_generation_prompt %}[assistant]{% endif %}",
    "unasked": _TURNS + "[assistant]<think>",
    "documents": "{% for d in documents or [] %}({{ d.title }}: {{ d.text }}){% endfor %}" + _TURNS,
    "untold": "{{ tools | tojson }}" + _TURNS,
    "plain": _TURNS + "{% if add_generation_prompt %}[assistant]{% endif %}",
}  # fmt: skip
_READY: dict[str, HfTokenizer] = {}


def tokenizer(name: str, folder: Path) -> HfTokenizer:
    if name not in _OWN:
        return family(name, folder).tokenizer
    if name not in _READY:
        _READY[name] = HfTokenizer(str(save(folder / name, _OWN[name])))
    return _READY[name]


def read(name: str, folder: Path, row: Mapping[str, Any], **recipe: Any) -> Prompt | Generation:
    settings: Any = {"sampling": SamplingParams(max_new_tokens=1), **recipe}
    [outcome] = PromptReader(Recipe(**settings), tokenizer(name, folder), {}).read([Row(0, "rows.jsonl", 1, row)])
    return outcome


def prompt(name: str, folder: Path, row: Mapping[str, Any], **recipe: Any) -> Prompt:
    outcome = read(name, folder, row, **recipe)
    assert isinstance(outcome, Prompt), outcome.error
    return outcome


def refusal(name: str, folder: Path, row: Mapping[str, Any], **recipe: Any) -> str:
    outcome = read(name, folder, row, **recipe)
    assert isinstance(outcome, Generation)
    assert outcome.error is not None
    return outcome.error.message


# model, what the row sets, form of calls, start mark of thinking, whether the prompt has begun it; None: no thinking
MARKUPS: list[tuple[str, dict[str, Any], str | None, str | None, bool]] = [
    ("plain", {}, None, None, False),
    ("qwen2.5", {"tools": [TOOL]}, "hermes", None, False),
    ("qwen2.5", {"tools": [TOOL], "tool_choice": "none"}, None, None, False),
    ("qwen3", {}, None, "<think>", False),
    ("qwen3", {"tools": [TOOL]}, "hermes", "<think>", False),
    ("qwen3", {"enable_thinking": False}, None, None, False),
    ("qwen3", {"reasoning_effort": "none"}, None, None, False),
    ("qwen3", {"chat_template_kwargs": {"enable_thinking": False}, "tools": [TOOL]}, "hermes", None, False),
    ("qwen3", {"tools": [TOOL], "tool_choice": "required"}, REQUIRED, "<think>", False),
    ("qwen3", {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
     NAMED + "weather", "<think>", False),
    ("deepseek-r1", {}, None, "<think>", True),
    ("coder", {"tools": [TOOL]}, "qwen3_coder", "<think>", True),
    ("seed", {}, None, "<seed:think>", False),
    ("seed", {"chat_template_kwargs": {"thinking_budget": 0}}, None, None, False),
    ("pythonic", {"tools": [TOOL]}, "pythonic", None, False),
    ("unasked", {}, None, "<think>", True),
    ("llama-3-tools", {"tools": [TOOL]}, "llama3_json", None, False),
    ("gpt-oss", {"tools": [TOOL]}, "gpt_oss", HARMONY.start, False),
    ("gpt-oss", {}, None, HARMONY.start, False),
    ("phi-3", {}, None, None, False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "form", "start", "is_open"), MARKUPS, ids=range(len(MARKUPS)))
def test_what_may_be_written_shows_in_template_and_prompt(
    tmp_path: Path, name: str, given: dict[str, Any], form: str | None, start: str | None, is_open: bool
) -> None:
    body = request({"messages": MESSAGES, "max_tokens": 1, **given})
    for row in ({"messages": MESSAGES, **given}, body):
        markup = prompt(name, tmp_path, row).markup
        assert (markup and markup.tools) == form
        thinking = None if markup is None else markup.thinking
        assert (thinking and thinking.start) == start
        assert thinking is None or thinking.is_open is is_open
        assert (markup is None) is (form is None and start is None)
        assert markup is prompt(name, tmp_path, row).markup  # one object for all rows alike


def test_the_words_of_earlier_turns_do_not_begin_or_end_the_thinking(tmp_path: Path) -> None:
    earlier = [
        {"role": "user", "content": "What does <think> mean?"},
        {"role": "assistant", "content": "<think>Hm.</think>It begins a thought."},
        {"role": "user", "content": "And </think>?"},
    ]
    for name, is_open in (("qwen3", False), ("deepseek-r1", True)):
        for messages in (earlier, [{"role": "user", "content": "</think> and <think>"}]):
            markup = prompt(name, tmp_path, {"messages": messages}).markup
            assert markup is not None
            assert markup.thinking is not None
            assert markup.thinking.is_open is is_open


def test_the_thinking_of_gpt_oss_ends_with_the_header_of_an_answer_where_nothing_may_be_called(tmp_path: Path) -> None:
    for given, end in (({}, "<|end|><|start|>assistant<|channel|>final<|message|>"), ({"tools": [TOOL]}, "<|end|>")):
        markup = prompt("gpt-oss", tmp_path, {"messages": MESSAGES, **given}).markup
        assert markup is not None
        assert markup.thinking is not None
        assert markup.thinking.end == end


def test_parsers_may_be_named_or_turned_off(tmp_path: Path) -> None:
    row = {"messages": MESSAGES, "tools": [TOOL]}
    assert prompt("qwen3", tmp_path, row, tool_parser="none", reasoning_parser="none").markup is None
    markup = prompt("qwen3", tmp_path, row, tool_parser="llama4_pythonic", reasoning_parser="seed_oss").markup
    assert markup is not None
    assert markup.tools == "pythonic"
    assert markup.thinking is not None
    assert markup.thinking.start == "<seed:think>"
    # What must be called is bound to it, whatever the form of the model's own calls is.
    forced = prompt("qwen3", tmp_path, {**row, "tool_choice": "required"}, tool_parser="none")
    assert forced.markup is not None
    assert forced.markup.tools == REQUIRED
    with pytest.raises(ValueError, match="--tool-parser must be auto, none or one of gpt_oss, mistral, "):
        Recipe(tool_parser="hermit")
    with pytest.raises(ValueError, match="--reasoning-parser must be auto, none or one of gpt_oss, seed_oss, "):
        Recipe(reasoning_parser="thinker")


def test_calls_in_a_form_that_nobody_knows_are_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = tokenizer("untold", tmp_path)
    rows = [Row(n, "a", n + 1, {"messages": MESSAGES, "tools": [TOOL]}) for n in range(3)]
    outcomes = PromptReader(Recipe(), own, {}).read(rows)
    assert all(isinstance(outcome, Prompt) and outcome.markup is None for outcome in outcomes)
    assert caplog.text.count('shows no form of calls that is known, so that calls of "tools" stay in text') == 1
    caplog.clear()
    PromptReader(Recipe(tool_parser="none"), own, {}).read(rows)
    PromptReader(Recipe(), tokenizer("qwen3", tmp_path), {}).read(rows)
    assert not caplog.text


def test_tools_come_into_the_prompt_as_transformers_writes_them(tmp_path: Path) -> None:
    for name in ("qwen2.5", "qwen3", "llama-3-tools", "gpt-oss"):
        rendered = prompt(name, tmp_path, {"messages": MESSAGES, "tools": [TOOL]}).text
        assert rendered == family(name, tmp_path).rendered(MESSAGES, tools=[TOOL])
        assert "weather" in rendered
        for nothing in ({}, {"tools": []}, {"tools": [TOOL], "tool_choice": "none"}):
            assert (
                prompt(name, tmp_path, {"messages": MESSAGES, **nothing}).text
                == prompt(name, tmp_path, {"messages": MESSAGES}).text
            )


def test_arguments_of_earlier_calls_reach_the_template_as_it_takes_them(tmp_path: Path) -> None:
    def calling(arguments: object) -> list[dict[str, Any]]:
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "No."}
        return [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}, result]

    written = '{"city": "Bönn"}'
    for name in ("qwen2.5", "qwen3", "llama-3-tools", "gpt-oss", "mistral", "deepseek-r1", "coder"):
        given = {"tools": [TOOL]} if name != "deepseek-r1" and name != "mistral" else {}
        texts = [
            prompt(name, tmp_path, row).text
            for arguments in (written, json.loads(written))
            for row in (
                {"messages": calling(arguments), **given},
                request({"messages": calling(arguments), "max_tokens": 1, **given}),
            )
        ]
        assert len(set(texts)) == 1, texts
        assert ("<parameter=city>Bönn<" if name == "coder" else written) in texts[0]
    # What is no JSON of an object stays as it is.
    assert "{city" in prompt("qwen2.5", tmp_path, {"messages": calling("{city")}).text


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"tool_calls": {}}, "body.messages[1]: tool_calls must be a list, not an empty object"),
        ({"tool_calls": ["x"]}, "body.messages[1].tool_calls[0] must be an object with id, type and function"),
        ({"tool_calls": [{"type": "custom", "function": {}}]}, 'tool_calls[0]: type must be "function", not "custom"'),
        ({"tool_calls": [{"function": {"name": ""}}]}, 'tool_calls[0]: function.name must be a text, not ""'),
        ({"tool_calls": [{"function": {"name": "f", "arguments": 5}}]}, "function.arguments must be JSON of an object"),
        ({"content": "x", "function_call": {"name": "f"}}, "function_call is not supported: write it into tool_calls"),
        ({"content": "x", "audio": {"id": "a"}}, "body.messages[1]: audio is not supported"),
    ],
)
def test_calls_in_bodies_have_the_form_of_openai(tmp_path: Path, message: dict[str, Any], sentence: str) -> None:
    messages = [*MESSAGES, {"role": "assistant", **message}, *MESSAGES]
    assert sentence in refusal("qwen2.5", tmp_path, request({"messages": messages}))


def test_what_a_template_would_leave_out_is_refused(tmp_path: Path) -> None:
    documents = [{"title": "Bonn", "text": "It rains."}]
    text = prompt("documents", tmp_path, {"messages": MESSAGES, "documents": documents}).text
    assert text.startswith("(Bonn: It rains.)")
    for given in ({"documents": documents}, {"chat_template_kwargs": {"documents": documents}}):
        assert "the model's chat template knows no documents" in refusal(
            "plain", tmp_path, {"messages": MESSAGES, **given}
        )
    said = refusal("plain", tmp_path, request({"messages": MESSAGES, "tools": [TOOL]}))
    assert "the model's chat template knows no tools, so that the model would not see them" in said


def test_a_forced_call_takes_the_place_of_another_constraint(tmp_path: Path) -> None:
    row: dict[str, Any] = {"messages": MESSAGES, "tools": [TOOL], "regex": "[ab]+"}
    said = refusal("qwen3", tmp_path, row)
    assert "tools cannot be called in a text that is constrained to a regex: set tool_choice to" in said
    for choice, kind in (("none", "regex"), ("required", "json_schema")):
        constraint = prompt("qwen3", tmp_path, {**row, "tool_choice": choice}).params.constraint
        assert constraint is not None
        assert constraint.kind == kind


# model, what the row sets, the message to go on with, what the prompt ends with
CONTINUED = [
    ("qwen2.5", {}, "The weather ", "<|im_start|>assistant\nThe weather "),
    ("plain", {}, " The", "[assistant] The"),
    ("llama-3-tools", {}, "The weather ", "<|end_header_id|>\n\nThe weather "),  # though the template trims
    ("qwen3", {"enable_thinking": False}, "The", "<|im_start|>assistant\n<think>\n\n</think>\n\nThe"),
    ("deepseek-r1", {}, "The", "<|Assistant|>The"),
    ("deepseek-r1", {}, "<think>\nI see", "<|Assistant|><think>\nI see"),
    ("gpt-oss", {}, "The", "<|start|>assistant<|channel|>final<|message|>The"),
]


@pytest.mark.parametrize(("name", "given", "words", "end"), CONTINUED, ids=range(len(CONTINUED)))
def test_the_last_message_is_gone_on_with(
    tmp_path: Path, name: str, given: dict[str, Any], words: str, end: str
) -> None:
    for content in (words, [{"type": "text", "text": words}]):
        messages = [*MESSAGES, {"role": "assistant", "content": content}]
        for both in ({}, {"add_generation_prompt": False}):
            row = {"messages": messages, "continue_final_message": True, **both, **given}
            assert prompt(name, tmp_path, row).text.endswith(end)
            assert prompt(name, tmp_path, request({**row, "max_tokens": 1})).text.endswith(end)


def test_thinking_may_be_gone_on_with(tmp_path: Path) -> None:
    for words, is_open in (("<think>\nI see", True), ("The", False)):
        messages = [*MESSAGES, {"role": "assistant", "content": words}]
        markup = prompt("deepseek-r1", tmp_path, {"messages": messages, "continue_final_message": True}).markup
        assert markup is not None
        assert markup.thinking is not None
        assert markup.thinking.is_open is is_open


def test_what_a_template_writes_in_other_words_is_not_gone_on_with(tmp_path: Path) -> None:
    for name, words, sentence in (
        ("qwen3", "The", "writes thinking before the last message, so that the model would go on with another text"),
        ("qwen3", "<think>\nI see", "writes thinking before the last message"),
        ("qwen3", "<think>I see</think>The", "writes the last message in other words than it has"),
        ("deepseek-r1", "<think>I see</think>The", "writes the last message in other words than it has"),
        ("plain", "", "writes the last message in other words than it has"),
    ):
        messages = [*MESSAGES, {"role": "assistant", "content": words}]
        assert sentence in refusal(name, tmp_path, {"messages": messages, "continue_final_message": True})


def test_a_prompt_may_end_without_the_beginning_of_a_turn(tmp_path: Path) -> None:
    row = {"messages": MESSAGES, "add_generation_prompt": False}
    assert prompt("qwen2.5", tmp_path, row).text.endswith("\n<|im_start|>user\nRain?<|im_end|>\n")


def test_a_row_may_bring_its_own_template_where_it_is_trusted(tmp_path: Path) -> None:
    own = "{% for m in messages %}\n<{{ m.role }}>{{ m.content }}{% endfor %}{{ bos_token }}<think>{{ tools | tojson }}"
    row = {"messages": MESSAGES, "chat_template": own}
    assert "start the run with --trust-templates" in refusal("plain", tmp_path, row)
    for each in (row, request({**row, "max_tokens": 1})):
        outcome = prompt("plain", tmp_path, each, trusts_templates=True)
        assert outcome.text.startswith("<user>Rain?")
        assert outcome.text.endswith("<think>null")
        assert outcome.markup is not None
        assert outcome.markup.thinking is not None
        assert outcome.markup.thinking.is_open


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% if %}", "chat_template is no Jinja template: line 1: "),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ 'x' * 10 ** 12 }}", "characters"),
        ("{{ raise_exception('No tools here') }}", "the row's chat template refused these messages: No tools here"),
        ("{{ strftime_now('%Y') }}", "'strftime_now' is undefined"),
        ("Hello", 'the row\'s chat template leaves out what message 1 of 1 says, whose role is "user"'),
    ],
)
def test_a_rows_own_template_is_rendered_in_a_sandbox(tmp_path: Path, template: str, sentence: str) -> None:
    row = {"messages": MESSAGES, "chat_template": template}
    assert sentence in refusal("plain", tmp_path, row, trusts_templates=True)


def test_smollm2_neither_thinks_nor_calls(smollm2: Path) -> None:
    own = HfTokenizer(str(smollm2))
    reader = PromptReader(Recipe(sampling=SamplingParams(max_new_tokens=1)), own, {})
    rows: list[dict[str, Any]] = [
        {"messages": MESSAGES},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "It is "}], "continue_final_message": True},
        {"messages": MESSAGES, "tools": [TOOL]},
        {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "none"},
    ]
    plain, continued, with_tools, without = reader.read(
        [Row(0, "a", 1, {"id": f"{n}", **r}) for n, r in enumerate(rows)]
    )
    assert isinstance(plain, Prompt)
    assert plain.markup is None
    assert plain.text.endswith("<|im_start|>assistant\n")
    assert isinstance(continued, Prompt)
    assert continued.text == plain.text + "It is "
    assert isinstance(with_tools, Generation)
    assert with_tools.error is not None
    assert "knows no tools" in with_tools.error.message
    assert isinstance(without, Prompt)
    assert without.text == plain.text
