"""Harmony, in which gpt-oss writes: messages in channels, thinking, answer and calls of tools alike.

A message in the channel `analysis` is thinking and one in `final` the answer. One in `commentary` that goes to
`functions.NAME` is a call; without a recipient it is said to the user.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
    <|message|>{…}<|call|>

The prompt ends with `<|start|>assistant`, so that a text begins in the middle of a message. From OpenAI's
description of the format.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from batchgen.requests.tools._form import Call, Functions, ParsedCalls, join_content
from batchgen.requests.tools._json import NoJson, read_value, skip_space

CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
MARKS: tuple[str, ...] = (CHANNEL, MESSAGE)
_START = "<|start|>"
THINKING_START = f"{CHANNEL}analysis{MESSAGE}"
THINKING_END = "<|end|>"
ANSWER_START = f"{_START}assistant{CHANNEL}final{MESSAGE}"

_ENDS = re.compile(r"<\|(?:end|call|return)\|>")
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([\w.-]+)")


class Messages(NamedTuple):
    """What a text in harmony holds."""

    content: str
    reasoning: str | None  # None: there is no message of thinking
    calls: list[Call]


def is_in(template: str) -> bool:
    """Whether a chat template writes calls in this form."""
    return CHANNEL in template and MESSAGE in template


def find_calls(text: str, functions: Functions) -> ParsedCalls | None:
    """The calls in `text`; None: there are none."""
    messages = read_messages(text)
    return ParsedCalls(messages.content, messages.calls) if messages.calls else None


def read_messages(text: str) -> Messages:
    """The messages of a text, special tokens included; words that are no message are content.

    A call whose arguments are no JSON object is content, without its header: the last one of a text may be cut off.
    """
    said: list[str] = []
    thoughts: list[str] = []
    calls: list[Call] = []
    for place, piece in enumerate(text.split(_START)):
        header, mark, body = piece.partition(MESSAGE)
        if not mark:
            if place == 0 and CHANNEL not in piece:  # elsewhere, it is a header that was cut off
                said.append(_ENDS.split(piece)[0])
            continue
        body = _ENDS.split(body)[0]
        channel, recipient = _CHANNEL_NAME.search(header), _RECIPIENT.search(header)
        to = recipient[1] if recipient else ""
        if to.startswith("functions.") and _is_object(body):
            calls.append(Call(to.removeprefix("functions."), body.strip()))
        elif channel is not None and channel[1] == "analysis":
            thoughts.append(body)
        else:
            said.append(body)
    content = said[0] if len(said) == 1 and not calls else join_content(said)
    return Messages(content, join_content(thoughts) if thoughts else None, calls)


def _is_object(text: str) -> bool:
    try:
        value, end = read_value(text, skip_space(text, 0))
    except NoJson:
        return False
    return isinstance(value, dict) and skip_space(text, end) == len(text)
