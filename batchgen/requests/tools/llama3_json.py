"""`{"name": …, "parameters": {…}}`, several parted by `;`, perhaps behind `<|python_tag|>`: Llama 3.

No mark tells such a call from an answer that is JSON, so the whole text must be calls, and of functions that the row
offers.
"""

from __future__ import annotations

from batchgen.requests.tools._form import Call, Functions, ParsedCalls
from batchgen.requests.tools._json import NoJson, arguments_of, name_of, read_object, skip_space

_TAG = "<|python_tag|>"
MARKS: tuple[str, ...] = (_TAG,)


def is_in(template: str) -> bool:
    """Whether a chat template writes calls in this form."""
    return _TAG in template or ("<|start_header_id|>" in template and '"parameters": ' in template)


def find_calls(text: str, functions: Functions) -> ParsedCalls | None:
    """The calls that `text` is; None: it is something else."""
    whole = text.strip().removeprefix(_TAG).strip()
    calls, at = [], 0
    try:
        while True:
            members, end = read_object(whole, at)
            calls.append(Call(name_of(members), arguments_of(members, "parameters", "arguments")))
            at = skip_space(whole, end)
            if at == len(whole):
                break
            if not whole.startswith(";", at):
                return None
            at = skip_space(whole, at + 1)
            if at == len(whole):
                break
    except NoJson:
        return None
    return ParsedCalls("", calls) if all(call.name in functions for call in calls) else None
