"""OpenAI's message that answers a chat: content, thinking and calls of tools. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchgen.requests.answers import Answer, answer_of, finish_reason
from batchgen.requests.refusal import Refused
from batchgen.requests.template import without_nulls
from batchgen.requests.tools import Call, offers
from batchgen.requests.tools.offers import read_offer
from batchgen.types import FinishReason, Generation

_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Message:
    """What a generation says, in the words of an answer."""

    content: str
    reasoning: str | None  # None: nothing was thought, or the row does not want it
    tool_calls: Sequence[Mapping[str, object]]  # as OpenAI writes them
    finish_reason: FinishReason | None
    has_markup: bool  # the model might have written more than its answer


def read_message(generation: Generation, name: str = "") -> Message:
    """What a good generation says.

    Args:
        name: tells its row from all others of the run, for the ids of calls; none: the row's own id.
    """
    given, is_body = _given(generation)
    answer = _answer(generation, given, "body." if is_body else "")
    calls = answer.calls[:1] if given.get("parallel_tool_calls") is False else answer.calls
    form = "" if generation.markup is None else generation.markup.tools or ""
    row = f"{name or generation.id}\0{generation.sample}"
    listed = [_tool_call(call, f"{row}\0{place}", form) for place, call in enumerate(calls)]
    reasoning = None if given.get("include_reasoning") is False else answer.reasoning
    has_markup = generation.markup is not None
    return Message(answer.content, reasoning, listed, finish_reason(generation, calls), has_markup)


def chat_message(message: Message, *, is_vllm: bool) -> dict[str, object]:
    """The object in a choice. vLLM calls the thinking `reasoning`, older versions and others `reasoning_content`; in
    vLLM's shape it has both names.

    Where the model may have written more than its answer, a content that is empty is null.
    """
    content = None if message.has_markup and not message.content else message.content
    written: dict[str, object] = {"role": "assistant", "content": content, "refusal": None}
    if message.reasoning is not None:
        written |= {"reasoning_content": message.reasoning, **({"reasoning": message.reasoning} if is_vllm else {})}
    if message.tool_calls:
        written["tool_calls"] = list(message.tool_calls)
    return written


def _given(generation: Generation) -> tuple[Mapping[str, object], bool]:
    """What the row sets: its body, or its columns; and whether it is a body."""
    if generation.request is None:
        return generation.columns, False
    body = generation.request.get("body")
    return (body if isinstance(body, Mapping) else {}), True


def _answer(generation: Generation, given: Mapping[str, object], prefix: str) -> Answer:
    if generation.markup is None or generation.markup.tools is None:
        return answer_of(generation, {})
    try:
        # In tables, the schema of a tool has every key that any row's has.
        offer = read_offer({key: without_nulls(given[key]) for key in offers.KEYS if key in given}, prefix)
    except Refused:  # it was read before the text was generated: these are not its columns
        offer = None
    return answer_of(generation, {} if offer is None else offer.functions)


def _tool_call(call: Call, name: str, form: str) -> dict[str, object]:
    """A call with an id that follows from its place, so that a resumed run writes the same."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    if form == "mistral":  # whose templates take no other ids
        number = int.from_bytes(digest[:8], "big")
        id = "".join(_LETTERS[number // len(_LETTERS) ** place % len(_LETTERS)] for place in range(9))
    else:
        id = f"call_{digest.hex()[:24]}"
    return {"id": id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def reasoning_tokens(generation: Generation) -> int | None:
    """The tokens of thinking in all samples of a row; None: the model has no form of it."""
    counts = [
        each.details.reasoning_tokens
        for each in (generation, *generation.others)
        if each.details is not None and each.details.reasoning_tokens is not None
    ]
    return sum(counts) if counts else None
