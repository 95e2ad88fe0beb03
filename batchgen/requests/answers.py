"""What a model has written, split into its answer, its thinking and its calls of tools. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from batchgen.requests import tools
from batchgen.requests.thinking import HARMONY, split_thinking
from batchgen.requests.tools import Call, Functions, gpt_oss
from batchgen.types import FinishReason, Generation, Markup

# Cohere's models have marks around the answer as well.
_AROUND_ANSWERS = re.compile(r"<\|(?:START|END)_(?:RESPONSE|TEXT)\|>")


@dataclass(frozen=True, slots=True)
class Answer:
    """The parts of one text."""

    content: str
    reasoning: str | None = None  # None: nothing was thought
    calls: Sequence[Call] = ()


def split_answer(text: str, markup: Markup, functions: Functions) -> Answer:
    """The parts of a text.

    Calls are looked for behind the thinking alone. Where one of them cannot be read, the whole text behind the thinking
    is content.

    Args:
        text: all that the model wrote; special tokens included, where its marks are such.
        functions: what the row offers, for forms in which a text alone says nothing of types.
    """
    reasoning, content = _split_thinking(text, markup)
    if markup.tools is None:
        return Answer(content, reasoning)
    if markup.tools == "gpt_oss":
        messages = gpt_oss.read_messages(_completed(text, markup))
        return Answer(messages.content, reasoning, messages.calls)
    found = tools.find_calls(markup.tools, content, functions)
    return Answer(content, reasoning) if found is None else Answer(found.content, reasoning, found.calls)


def _split_thinking(text: str, markup: Markup) -> tuple[str | None, str]:
    thinking = markup.thinking
    if thinking is None:
        return None, text
    if thinking.start == HARMONY.start:
        messages = gpt_oss.read_messages(_completed(text, markup))
        return messages.reasoning or None, messages.content
    reasoning, content = split_thinking(text, thinking)
    return reasoning or None, _AROUND_ANSWERS.sub("", content) if "<|START_THINKING|>" in thinking.start else content


def _completed(text: str, markup: Markup) -> str:
    """The text with the header of its first message, where that stands in the prompt."""
    is_open = markup.thinking is not None and markup.thinking.is_open
    return HARMONY.start + text if is_open and not text.startswith(HARMONY.start) else text


def answer_of(generation: Generation, functions: Functions) -> Answer:
    """The parts of a good generation's text.

    Marks that are no special tokens stand in the text itself. Then that is what is split, since it holds no other
    special tokens.
    """
    text, markup = generation.text or "", generation.markup
    if markup is None:
        return Answer(text)
    raw = None if generation.details is None else generation.details.raw_text
    return split_answer(text if raw is None or _has_same_marks(text, raw, markup) else raw, markup, functions)


def _has_same_marks(text: str, raw: str, markup: Markup) -> bool:
    thinking = () if markup.thinking is None else (markup.thinking.start, markup.thinking.end)
    marks = (*thinking, *(() if markup.tools is None else tools.marks_of(markup.tools)))
    return all(text.count(mark) == raw.count(mark) for mark in marks)


def finish_reason(generation: Generation, calls: Sequence[Call]) -> FinishReason | None:
    """Why a text ended, as OpenAI says it: `tool_calls` if it ended by itself and calls tools, unless the request has
    named the function."""
    is_named = generation.markup is not None and (generation.markup.tools or "").startswith(tools.NAMED)
    return "tool_calls" if calls and generation.finish_reason == "stop" and not is_named else generation.finish_reason
