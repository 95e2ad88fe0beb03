"""Texts of models, split into answer, thinking and calls of tools: a table of cases for each form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from batchgen.requests.answers import Answer, finish_reason, split_answer
from batchgen.requests.thinking import HARMONY, Marks, marks_in_template, marks_of, split_thinking, thinking_of
from batchgen.requests.tools import FORMS, NAMED, REQUIRED, form_of_template
from batchgen.types import Generation, Markup, Thinking

FUNCTIONS: Mapping[str, Mapping[str, object]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "share": {"type": "number"},
            "now": {"type": "boolean"},
            "tags": {"type": "array"},
            "place": {"anyOf": [{"type": "object"}, {"type": "null"}]},
            "unit": {"enum": ["C", "F"]},
            "level": {"enum": [1, 2]},
            "note": {"type": ["string", "null"]},
        },
    },
    "time": {"type": "object", "properties": {}},
}
THINK = Thinking("<think>", "</think>", is_open=False)
OPEN = Thinking("<think>", "</think>", is_open=True)

Calls = Sequence[tuple[str, str]]


def split(text: str, form: str | None = None, thinking: Thinking | None = None) -> Answer:
    return split_answer(text, Markup(thinking, form), FUNCTIONS)


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


BONN = '{"city": "Bonn"}'
CODER = "<tool_call>\n<function=weather>\n{}</function>\n</tool_call>"
HARMONY_CALL = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>" + BONN
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
START = "<|start|>assistant"


def parameters(**values: str) -> str:
    return CODER.format("".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()))


# form, text, content, calls; content None: the whole text, since nothing in it is a call that can be read
CASES: Sequence[tuple[str, str, str | None, Calls]] = [
    ("hermes", call("weather", BONN), "", [("weather", BONN)]),
    ("hermes", "Let me see.\n" + call("weather", BONN), "Let me see.", [("weather", BONN)]),
    ("hermes", call("weather", BONN) + "\n" + call("time", "{}"), "", [("weather", BONN), ("time", "{}")]),
    ("hermes", call("weather", BONN).removesuffix("\n</tool_call>"), "", [("weather", BONN)]),
    ("hermes", "A " + call("time", "{}") + " B", "A\n\nB", [("time", "{}")]),
    ("hermes", call("weather", '{"a": {"b": [{"c": "}"}]}}'), "", [("weather", '{"a": {"b": [{"c": "}"}]}}')]),
    ("hermes", call("weather", '{"city":  "K\\u00f6ln 🙂 é"}'), "", [("weather", '{"city":  "K\\u00f6ln 🙂 é"}')]),
    ("hermes", call("weather", '{"a": "</tool_call>"}'), "", [("weather", '{"a": "</tool_call>"}')]),
    ("hermes", call("weather", json.dumps(BONN)), "", [("weather", BONN)]),
    ("hermes", '<tool_call>{"name": "time"}</tool_call>', "", [("time", "{}")]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "of_nobody"}</tool_call>', "", [("of_nobody", '{"a": 1}')]),
    ("hermes", call("weather", BONN)[:-30], None, []),
    ("hermes", call("weather", BONN) + "\n<tool_call>\n{", None, []),
    ("hermes", call("weather", "{city: Bonn}"), None, []),
    ("hermes", call("weather", "[1]"), None, []),
    ("hermes", call("weather", '{"a": NaN}'), None, []),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "time"} and more</tool_call>', None, []),
    ("hermes", "<tool_call>" + '{"a":' * 100_000, None, []),
    ("hermes", "No call.", None, []),
    ("qwen3_coder", parameters(city="Bonn"), "", [("weather", BONN)]),
    ("qwen3_coder", "So:\n" + parameters(city="Bonn", days="3"), "So:", [("weather", '{"city": "Bonn", "days": 3}')]),
    ("qwen3_coder", parameters(share="0.5", now="True"), "", [("weather", '{"share": 0.5, "now": true}')]),
    ("qwen3_coder", parameters(tags='["a", 1]', place="null"), "", [("weather", '{"tags": ["a", 1], "place": null}')]),
    ("qwen3_coder", parameters(unit="C", level="2", note="null"), "", [
        ("weather", '{"unit": "C", "level": 2, "note": null}')
    ]),
    ("qwen3_coder", parameters(city="5", unknown="5", days="five"), "", [
        ("weather", '{"city": "5", "unknown": "5", "days": "five"}')
    ]),
    ("qwen3_coder", parameters(city="\n  a\n<b>\n é🙂"), "", [("weather", '{"city": "\\n  a\\n<b>\\n é🙂"}')]),
    ("qwen3_coder", parameters(city="A") + "\n" + parameters(city="B"), "", [
        ("weather", '{"city": "A"}'), ("weather", '{"city": "B"}')
    ]),
    ("qwen3_coder", "<function=time></function>", "", [("time", "{}")]),
    ("qwen3_coder", parameters(city="A").removesuffix("\n</tool_call>"), "", [("weather", '{"city": "A"}')]),
    ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=city>\nBon", None, []),
    ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=city>\nBonn\n</parameter>\n", None, []),
    ("qwen3_coder", "No call.", None, []),
    ("llama3_json", '{"name": "weather", "parameters": {"city": "Bonn"}}', "", [("weather", BONN)]),
    ("llama3_json", ' <|python_tag|>{"name": "weather", "arguments": {"city": "Bonn"}}\n', "", [("weather", BONN)]),
    ("llama3_json", '{"name": "time", "parameters": {}}; {"name": "weather", "parameters": {"city": "Bonn"}}', "", [
        ("time", "{}"), ("weather", BONN)
    ]),
    ("llama3_json", '{"name": "of_nobody", "parameters": {}}', None, []),  # an answer that is JSON
    ("llama3_json", 'Here: {"name": "time", "parameters": {}}', None, []),
    ("llama3_json", '{"name": "time", "parameters": {}} then', None, []),
    ("llama3_json", '{"name": "time", "parameters": {"a": {', None, []),
    ("pythonic", '[weather(city="Bonn")]', "", [("weather", BONN)]),
    ("pythonic", "[weather(city='B\"é🙂', days=-3, tags=[1, {'a': None}], now=true), time()]", "", [
        ("weather", '{"city": "B\\"é🙂", "days": -3, "tags": [1, {"a": null}], "now": true}'), ("time", "{}")
    ]),
    ("pythonic", "<|python_start|>[time()]<|python_end|>", "", [("time", "{}")]),
    ("pythonic", '[weather(city="Bonn"', None, []),
    ("pythonic", '[weather(city=open("x"))]', None, []),
    ("pythonic", "[weather(city=1 + 1)]", None, []),
    ("pythonic", '[weather("Bonn")]', None, []),
    ("pythonic", '[weather(**{"city": "Bonn"})]', None, []),
    ("pythonic", "[of_nobody(a=1)]", None, []),
    ("pythonic", "[time()] and more", None, []),
    ("pythonic", "[1, 2]", None, []),
    ("pythonic", "[]", None, []),
    ("pythonic", "[" * 1000 + "]" * 1000, None, []),
    ("pythonic", "[weather(city='\\d \x00')]", None, []),
    ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bonn"}}]', "", [("weather", BONN)]),
    ("mistral", 'Yes.[TOOL_CALLS][{"name": "time", "arguments": {}}, {"name": "time", "arguments": {"a": "]é"}}]',
     "Yes.", [("time", "{}"), ("time", '{"a": "]é"}')]),
    ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "Bonn"}', "", [("weather", BONN)]),
    ("mistral", '[TOOL_CALLS]weather{"city": "Bonn"}[TOOL_CALLS]time[CALL_ID]abcdefghi[ARGS]{}', "", [
        ("weather", BONN), ("time", "{}")
    ]),
    ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bo', None, []),
    ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "Bo', None, []),
    ("mistral", "[TOOL_CALLS]", None, []),
    ("mistral", '[TOOL_CALLS][{"name": "time"}] and more', None, []),
    ("mistral", "No call.", None, []),
    ("gpt_oss", HARMONY_CALL + "<|call|>", "", [("weather", BONN)]),
    ("gpt_oss", HARMONY_CALL, "", [("weather", BONN)]),
    ("gpt_oss", "<|channel|>commentary<|message|>I look.<|end|>" + START + HARMONY_CALL, "I look.", [
        ("weather", BONN)
    ]),
    ("gpt_oss", HARMONY_CALL + "<|call|>" + START + HARMONY_CALL, "", [("weather", BONN), ("weather", BONN)]),
    ("gpt_oss", " to=functions.time<|channel|>commentary json<|message|>{}", "", [("time", "{}")]),
    ("gpt_oss", HARMONY_CALL[:-5], BONN[:-5], []),
    ("gpt_oss", FINAL + "It rains.<|return|>", "It rains.", []),
    ("gpt_oss", "It rains.", "It rains.", []),
    (REQUIRED, '[{"name": "weather", "parameters": {"city": "Bonn"}}]', "", [("weather", BONN)]),
    (REQUIRED, ' [{"name":"time","parameters":{}},{"name":"time","parameters":{"a":1}}]\n', "", [
        ("time", "{}"), ("time", '{"a":1}')
    ]),
    (REQUIRED, '[{"name": "weather", "parameters": {"city"', None, []),
    (REQUIRED, "[]", None, []),
    (NAMED + "weather", BONN, "", [("weather", BONN)]),
    (NAMED + "weather", '{"city": "Bo', "", [("weather", '{"city": "Bo')]),
    (NAMED + "weather", "", None, []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES, ids=range(len(CASES)))
def test_calls_are_read(form: str, text: str, content: str | None, calls: Calls) -> None:
    answer = split(text, form)
    assert [tuple(each) for each in answer.calls] == list(calls)
    assert answer.content == (text if content is None else content)
    for each in answer.calls:
        assert form.startswith(NAMED) or isinstance(json.loads(each.arguments), dict)


def test_every_form_has_cases_with_and_without_calls() -> None:
    own = {form for form, *_ in CASES} & set(FORMS)
    assert own == set(FORMS) - {"openai", "qwen3_xml", "llama4_json", "llama4_pythonic"}
    for name in own:
        assert {bool(calls) for form, _, _, calls in CASES if form == name} == {True, False}


@pytest.mark.parametrize(
    ("thinking", "text", "reasoning", "content"),
    [
        (THINK, "<think>\nI see.\n</think>\n\nYes.\n", "I see.", "Yes.\n"),
        (THINK, "\n<think>a</think>b</think>c", "a", "b</think>c"),
        (THINK, "<think>cut off", "cut off", ""),
        (THINK, "<think>\n\n</think>\n\nYes.", "", "Yes."),
        (THINK, " Yes.", None, " Yes."),
        (THINK, "I say </think> aloud", None, "I say </think> aloud"),
        (OPEN, "I see.</think>Yes.", "I see.", "Yes."),
        (OPEN, "<think>I see.</think>Yes.", "I see.", "Yes."),
        (OPEN, "still thinking", "still thinking", ""),
        (OPEN, "</think>Yes.", "", "Yes."),
    ],
)
def test_thinking_is_split_off(thinking: Thinking, text: str, reasoning: str | None, content: str) -> None:
    assert split_thinking(text, thinking) == (reasoning, content)
    answer = split(text, None, thinking)
    assert (answer.content, answer.reasoning, answer.calls) == (content, reasoning or None, ())


def test_a_call_within_the_thinking_is_none() -> None:
    thought = call("weather", BONN)
    assert split(f"<think>{thought}</think>Yes.", "hermes", THINK) == Answer("Yes.", thought, ())
    answer = split(f"{thought}</think>{call('time', '{}')}", "hermes", OPEN)
    assert (answer.content, answer.reasoning, list(answer.calls)) == ("", thought, [("time", "{}")])
    assert split(f"<think>{thought}", "hermes", THINK) == Answer("", thought, ())


ONLY_FINAL = Thinking(HARMONY.start, HARMONY.end + START + FINAL, is_open=False)


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        (f"{ANALYSIS}I see.<|end|>{START}{FINAL}Yes.<|return|>", False, ("Yes.", "I see.", [])),
        (f"{ANALYSIS}I see.<|end|>{START}{FINAL}Ye", False, ("Ye", "I see.", [])),
        (f"{ANALYSIS}I see.<|end|>{START}{HARMONY_CALL}", False, ("", "I see.", [("weather", BONN)])),
        (f"{ANALYSIS}A<|end|>{START}{ANALYSIS}B<|end|>{START}{FINAL}Yes.", False, ("Yes.", "A\n\nB", [])),
        (f"{ANALYSIS}cut off", False, ("", "cut off", [])),
        (f"{ANALYSIS}{BONN}<|end|>{START}<|channel|>fi", False, ("", BONN, [])),
        (f"I see.<|end|>{START}{FINAL}Yes.", True, ("Yes.", "I see.", [])),
        (f"{FINAL} Yes.\n", False, (" Yes.\n", None, [])),
    ],
)
def test_harmony_is_read_as_messages(text: str, is_open: bool, expected: tuple[str, str | None, list[Any]]) -> None:
    content, reasoning, calls = expected
    answer = split(text, "gpt_oss", Thinking(HARMONY.start, HARMONY.end, is_open))
    assert (answer.content, answer.reasoning, list(answer.calls)) == (content, reasoning, calls)
    if not calls:  # nor may it make any: its thinking ends where the header of its answer does
        answer = split(text, None, Thinking(ONLY_FINAL.start, ONLY_FINAL.end, is_open))
        assert (answer.content, answer.reasoning) == (content, reasoning)


def test_a_forced_call_of_harmony_is_its_final_message() -> None:
    text = f'{ANALYSIS}I see.<|end|>{START}{FINAL}[{{"name": "weather", "parameters": {BONN}}}]'
    answer = split(text, REQUIRED, ONLY_FINAL)
    assert (answer.content, answer.reasoning, list(answer.calls)) == ("", "I see.", [("weather", BONN)])


@pytest.mark.parametrize(
    ("template", "marks", "form"),
    [
        ("{{ '<|im_start|>' }}", None, None),
        ("<tool_call> </think>", Marks("<think>", "</think>"), "hermes"),
        ("<tool_call> <function= <parameter= <think>", Marks("<think>", "</think>"), "qwen3_coder"),
        ("<tool_call> <arg_key> <think>", Marks("<think>", "</think>"), None),
        ("<seed:think>", Marks("<seed:think>", "</seed:think>"), None),
        ("[TOOL_CALLS] [THINK]", Marks("[THINK]", "[/THINK]"), "mistral"),
        ("<|START_THINKING|>", Marks("<|START_THINKING|>", "<|END_THINKING|>"), None),
        ("<|channel|> <|message|> <think>", HARMONY, "gpt_oss"),
        ("<|user|> <|end|>", None, None),  # Phi's marks are no harmony
        ("<|python_tag|>", None, "llama3_json"),
        ("<|python_tag|> <|python_start|>", None, "pythonic"),
    ],
)
def test_forms_show_in_templates(template: str, marks: Marks | None, form: str | None) -> None:
    assert (marks_in_template(template), form_of_template(template)) == (marks, form)


def test_parsers_have_the_names_of_vllm_too() -> None:
    assert marks_of("qwen3") == marks_of("deepseek_r1") == marks_of("think") == Marks("<think>", "</think>")
    assert marks_of("openai_gptoss") == HARMONY


@pytest.mark.parametrize(
    ("turn", "is_open"),
    [
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\n", True),
        ("<think>\n\n</think>\n\n", None),
        ("<think>a</think> <think>b", True),
    ],
)
def test_the_mark_that_comes_last_in_the_turn_counts(turn: str, is_open: bool | None) -> None:
    thinking = thinking_of(Marks("<think>", "</think>"), turn, may_call=False)
    assert (None if thinking is None else thinking.is_open) is is_open


def test_marks_around_the_answers_of_cohere_are_left_out() -> None:
    thinking = Thinking("<|START_THINKING|>", "<|END_THINKING|>", is_open=False)
    text = "<|START_THINKING|>I see.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>"
    assert split(text, None, thinking) == Answer("Yes.", "I see.", ())


def test_a_text_with_calls_ends_for_them_unless_it_was_cut_or_the_call_was_named() -> None:
    calls = split(call("time", "{}"), "hermes").calls
    for form, reason, expected in (
        ("hermes", "stop", "tool_calls"),
        ("hermes", "length", "length"),
        (REQUIRED, "stop", "tool_calls"),
        (NAMED + "time", "stop", "stop"),
    ):
        generation = Generation(0, "a", "", reason, 1, 1, None, {}, markup=Markup(None, form))  # type: ignore[arg-type]
        assert finish_reason(generation, calls) == expected
        assert finish_reason(generation, ()) == reason
