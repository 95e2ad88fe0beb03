"""`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, repeated: Hermes, Qwen 2.5 and 3, SmolLM3 and many others.

A last call may lack its end mark, which some models leave out before they end.
"""

from __future__ import annotations

from batchgen.requests.tools._form import Call, Functions, ParsedCalls, join_content
from batchgen.requests.tools._json import NoJson, arguments_of, name_of, read_object, skip_space

_START, _END = "<tool_call>", "</tool_call>"
MARKS: tuple[str, ...] = (_START, _END)


def is_in(template: str) -> bool:
    """Whether a chat template writes calls in this form."""
    return _START in template and "<arg_key>" not in template  # which GLM's calls have in the place of JSON


def find_calls(text: str, functions: Functions) -> ParsedCalls | None:
    """The calls in `text`; None: there are none, or one of them cannot be read."""
    pieces, calls, at = [], [], 0
    try:
        while (begin := text.find(_START, at)) >= 0:
            pieces.append(text[at:begin])
            members, end = read_object(text, skip_space(text, begin + len(_START)))
            calls.append(Call(name_of(members), arguments_of(members, "arguments", "parameters")))
            at = skip_space(text, end)
            if text.startswith(_END, at):
                at += len(_END)
            elif at < len(text) and not text.startswith(_START, at):
                return None
    except NoJson:
        return None
    return ParsedCalls(join_content([*pieces, text[at:]]), calls) if calls else None
