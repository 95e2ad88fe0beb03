"""The arguments of earlier calls of tools, in the form that a chat template takes: an object, or JSON text.

OpenAI's messages hold JSON text. Most templates write an object as JSON and would write a text as JSON within JSON;
some put a text into the prompt as it is. A template does not say which, so both are tried out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from batchgen.models.message_content import Message, Render

_KEY, _VALUE = "zqkey", "zqvalue"  # words that no template writes by itself
_WRITTEN_AS_JSON = re.compile(rf'"{_KEY}"\s*:\s*"{_VALUE}"')
_TOOL: Message = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "What."}}},
    },
}


class _Forms(NamedTuple):
    """The forms of arguments that come into the prompt as they are meant."""

    objects: bool
    texts: bool


class CallArguments:
    """Gives one chat template the arguments of calls in a form that it takes.

    Args:
        render: renders messages with the template.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._forms = lru_cache(2)(self._try_out)

    def fit(self, messages: Sequence[Message], *, with_tools: bool) -> list[Message]:
        """The messages with arguments as the template takes them; as they are, where it takes them so or neither way.

        A text that is no JSON of an object stays a text.
        """
        return [
            {**message, "tool_calls": [self._fit_call(call, with_tools) for call in calls]}
            if isinstance(calls := message.get("tool_calls"), list)
            else message
            for message in messages
        ]

    def _fit_call(self, call: object, with_tools: bool) -> object:
        function = call.get("function") if isinstance(call, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if not (isinstance(call, Mapping) and isinstance(function, Mapping) and isinstance(arguments, (str, Mapping))):
            return call
        forms = self._forms(with_tools)
        if isinstance(arguments, str) and forms.objects and not forms.texts:
            fitted = _parsed(arguments)
        elif isinstance(arguments, Mapping) and forms.texts and not forms.objects:
            fitted = json.dumps(arguments, ensure_ascii=False)
        else:
            return call
        return {**call, "function": {**function, "arguments": fitted}}

    def _try_out(self, with_tools: bool) -> _Forms:
        tools = [_TOOL] if with_tools else None
        objects = self._shows({_KEY: _VALUE}, tools, _shows_object)
        texts = self._shows(json.dumps({_KEY: _VALUE}), tools, lambda text: bool(_WRITTEN_AS_JSON.search(text)))
        return _Forms(objects, texts)

    def _shows(self, arguments: object, tools: Sequence[Message] | None, is_shown: Callable[[str], bool]) -> bool:
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": arguments}}
        user: Message = {"role": "user", "content": "Hello"}
        calling: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        result: Message = {"role": "tool", "tool_call_id": "abcdefghi", "name": "look", "content": "Sky"}
        for messages in ([user, calling, result], [user, calling, result, {**calling, "content": "So"}, result, user]):
            try:
                text = self._render(messages, tools)
            except Exception:  # a template is a program that came with the model: it can raise anything
                continue
            if is_shown(text):
                return True
        return False


def _shows_object(text: str) -> bool:
    """Whether the object stands in the prompt, and not as Python writes it. The tool's own schema has its key, too."""
    return _VALUE in text and f"'{_KEY}'" not in text


def _parsed(arguments: str) -> object:
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
