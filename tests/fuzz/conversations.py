"""A seeded fuzzer of conversations: any turns, through the chat templates of many families.

Every seed makes a conversation, as a row of JSON lines, of a table, or as a line of an OpenAI batch file. No exception
may come out. A word of a text that any way of giving Transformers the same conversation brings into the prompt is in
batchgen's prompt too, and so is each word of all turns but the assistant's: a template that leaves one out is a refused
row. What Transformers renders without a loss is not refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa

from batchgen.requests.prompts import PromptReader
from batchgen.requests.recipe import Recipe
from batchgen.types import Generation, Row, SamplingParams
from tests.conversations import PARTS_ALONE, TOOL, Family, families, family, joined, parts, split

_WORD = re.compile(r"zw\d+q")
_THOUGHT = re.compile(r"<think>(zw\d+q)")
_WRITTEN_OUT = re.compile(r"""['"]text['"]\s*:\s*['"]zw""")
_SURROUNDINGS = ("{}", " {} ", "\n{}\n\n", "{}{{{{ x }}}}", "é{}ü 🙂", '"{}"', "<think>{}</think>", "a {} b", "{}</s>")
_FAULTS: tuple[tuple[Any, str], ...] = (
    ([{"type": "image_url", "image_url": {"url": "x"}}], "images are not supported yet"),
    ([{"type": "input_audio", "input_audio": {}}], "audio is not supported yet"),
    ([{"type": "text", "text": 5}], "must be a text, not 5"),
    ([{"text": "x"}], "not null"),
    (["x"], 'not "x"'),
    (7, "content must be a text or a list of text parts, not 7"),
    ({"a": 1}, "not an object"),
)
_URLS = {"chat": "/v1/chat/completions", "response": "/v1/responses"}
_TURNS = ("system", "developer", "user", "assistant")
_USER: dict[str, Any] = {"role": "user", "content": "zw0q"}
# One that says the length itself, so that nobody is told that it is the default.
_RECIPE = Recipe(sampling=SamplingParams(max_new_tokens=1))


class _Maker:
    """Draws a conversation."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._words = 0

    def messages(self) -> list[dict[str, Any]]:
        """Turns in a usual order, of which some are missing, twice there, or of an odd role."""
        random = self._random
        turns = ["system"] if random.random() < 0.4 else []
        for _ in range(random.randint(1, 3)):
            turns += ["user", "assistant"]
            if random.random() < 0.2:
                turns += ["tool", "assistant"]
        if random.random() < 0.8 and turns[-1] == "assistant":
            turns.pop()
        if random.random() < 0.15:
            turns.pop(random.randrange(len(turns)))
        if random.random() < 0.15:
            turns.insert(random.randrange(len(turns) + 1), random.choice(["system", "developer", "user", "critic", ""]))
        return [self._message(role, turns[place + 1 : place + 2]) for place, role in enumerate(turns)] or [
            self._message("user", [])
        ]

    def _message(self, role: str, following: Sequence[str]) -> dict[str, Any]:
        random = self._random
        message: dict[str, Any] = {"role": role, "content": self._content()}
        if role == "tool":
            message |= {"tool_call_id": "abcdefghi", "name": "weather"}
        if following == ["tool"]:
            city: Any = {"city": self._word(), "unit": None} if random.random() < 0.5 else '{"city": "Bonn"}'
            call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": city}}
            message |= {"tool_calls": [call], "content": random.choice([None, "", message["content"]])}
        elif random.random() < 0.1:
            message |= {random.choice(["name", "refusal", "tool_calls"]): None}
        elif random.random() < 0.05:
            message["tool_calls"] = []
        return message

    def _content(self) -> Any:
        if self._random.random() < 0.5:
            return self._text()
        return parts(*(self._text() for _ in range(self._random.choice([0, 1, 1, 2, 2, 3]))))

    def _text(self) -> str:
        if self._random.random() < 0.05:
            return ""
        return self._random.choice(_SURROUNDINGS).format(self._word())

    def _word(self) -> str:
        self._words += 1
        return f"zw{self._words}q"


def case(seed: int, folder: Path) -> str:
    """Makes the conversation of `seed`, reads it, and checks all that must hold; gives what has become of it.

    Tokenizers are made once a process, by way of files in `folder`.

    Raises:
        AssertionError, or whatever has escaped.
    """
    random = Random(seed)
    model = family(random.choice(families()), folder)
    messages = _Maker(random).messages()
    form = random.choice(["lines", "lines", "table", "chat", "response"])
    if form == "table":  # whose columns have one type
        messages = random.choice([joined, split])(messages)
    if form == "response":  # which knows no tools
        messages = [_turn(message) for message in messages if message["role"] in _TURNS] or [_USER]
    fault = None
    if random.random() < 0.1:
        content, fault = random.choice(_FAULTS)
        place = random.randrange(len(messages))
        messages[place] = {**messages[place], "content": content}
    kwargs: dict[str, Any] = {"tools": [TOOL]} if random.random() < 0.2 else {}
    if random.random() < 0.2:
        kwargs["enable_thinking"] = random.random() < 0.5
    row = _row(form, messages, kwargs)
    if row is None:
        return "no table"
    [outcome] = PromptReader(_RECIPE, model.tokenizer, {}).read([row])
    if isinstance(outcome, Generation):
        assert outcome.error is not None
        assert outcome.error.message.startswith("line 3 of talk: "), outcome.error
        if fault is not None:
            assert fault in outcome.error.message, outcome.error
            return "faulty"
        assert outcome.error.type == "template", outcome.error
        if "make one message of them" in outcome.error.message:
            return "two systems"
        _check_refusal(model, _given(messages, form), kwargs)
        return "refused"
    assert fault is None, "a faulty conversation is good"
    _check_prompt(outcome.text, model, _given(messages, form), kwargs)
    return "good"


def _row(form: str, messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> Row | None:
    value: dict[str, Any] = {"messages": messages, "chat_template_kwargs": kwargs}
    if form == "response":
        value = {"input": [_item(message) for message in messages], "chat_template_kwargs": kwargs}
    if form in _URLS:
        value = {"custom_id": "a", "method": "POST", "url": _URLS[form], "body": value}
    if form != "table":
        return Row(0, "talk", 3, value)
    try:
        table = pa.Table.from_pylist([value, {"messages": [{"role": "x", "content": None, "odd": {"deep": 1}}]}])
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None  # contents or arguments of several kinds have no place in one column
    return Row(0, "talk", 3, table.to_pylist()[0], has_every_key=True)


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": message["role"], "content": message["content"] or ""}


def _item(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as an item of `input`."""
    kind = "output_text" if message["role"] == "assistant" else "input_text"
    content = message["content"]
    if isinstance(content, list):
        content = [{**p, "type": kind} if isinstance(p, dict) and p.get("type") == "text" else p for p in content]
    return {"type": "message", "role": message["role"], "content": content}


def _given(messages: Sequence[Mapping[str, Any]], form: str) -> list[dict[str, Any]]:
    """The messages without what is null or empty; in a table, without nulls at any depth."""
    kept = _filled(messages) if form == "table" else messages
    return [
        {key: value for key, value in one.items() if value is not None and (value != [] or key == "content")}
        for one in kept
    ]


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _filled(each) for key, each in value.items() if each is not None}
    return [_filled(each) for each in value] if isinstance(value, list) else value


def _variants(messages: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    yield from (messages, joined(messages), split(messages))
    if any(message["role"] == "developer" for message in messages):
        system = [{**one, "role": "system" if one["role"] == "developer" else one["role"]} for one in messages]
        yield from (system, joined(system), split(system))


def _words_of(messages: Sequence[Mapping[str, Any]]) -> set[str]:
    return {word for message in joined(messages) for word in _WORD.findall(message.get("content") or "")}


def _check_prompt(text: str, model: Family, messages: Sequence[Mapping[str, Any]], kwargs: dict[str, Any]) -> None:
    # Whether thoughts of earlier turns are kept is the template's business, and hangs on what stands behind them.
    words = _words_of(messages) - set(_THOUGHT.findall(str(messages)))
    own = [model.rendered(variant, **kwargs) for variant in _variants(messages)]
    shown = {word for each in own if each is not None for word in _WORD.findall(each)}
    said = _words_of([message for message in messages if message["role"] != "assistant"]) & words
    lost = (words & shown | said) - set(_WORD.findall(text))
    assert not lost, f"{model.name} has lost {lost} of {messages} in {text!r}"
    assert not _WRITTEN_OUT.search(text) or "tool_calls" in str(messages), f"{model.name} writes a list out: {text!r}"
    if all(isinstance(message.get("content", ""), str) for message in messages):
        expected = own[2] if model.name in PARTS_ALONE else own[0]
        roles = {message["role"] for message in messages}
        assert text == expected or "developer" in roles, (model.name, text, expected)


def _check_refusal(model: Family, messages: Sequence[Mapping[str, Any]], kwargs: dict[str, Any]) -> None:
    for variant in _variants(messages):
        text = model.rendered(variant, **kwargs)
        lossless = (
            text is not None and _words_of(messages) <= set(_WORD.findall(text)) and not _WRITTEN_OUT.search(text)
        )
        assert not lossless, f"{model.name} takes {variant}, and {messages} was refused"
