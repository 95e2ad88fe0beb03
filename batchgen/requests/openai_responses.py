"""OpenAI's Responses API in batch files: the body of a line for `/v1/responses`, and the object that answers it. Pure.

A request is a text or a list of messages of text, with instructions before them. What keeps a state on a server
(`previous_response_id`, `conversation`, `background`), calls tools or reasons by an effort is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping

from batchgen.requests import openai_logprobs
from batchgen.requests.openai_message import read_message, reasoning_tokens
from batchgen.requests.refusal import Refused, quote
from batchgen.requests.template import why_no_text, without_null_keys
from batchgen.types import Generation

RESPONSES = "/v1/responses"

READ = frozenset({"input", "instructions", "include", "chat_template_kwargs", "text"})
"""Keys of the body that are read here."""

HARMLESS = frozenset({"max_tool_calls", "background_options"})
"""Keys that change nothing where there are neither tools nor a server."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "background": (False,),
    "truncation": ("disabled",),
    "reasoning": ({},),
    "context_management": ([],),
    **dict.fromkeys(("previous_response_id", "conversation", "prompt", "moderation"), ()),
}
"""Keys that change the output, and the values (besides null) with which they do not."""

_ROLES = ("user", "assistant", "system", "developer")
_PARTS = ("input_text", "output_text")
_LOGPROBS = "message.output_text.logprobs"


def conversation_of(body: Mapping[str, object]) -> list[dict[str, object]]:
    """The messages of a body, instructions first, each content a text or a list of text parts.

    Raises:
        Refused: there is no input, or it holds something else.
    """
    instructions, given = body.get("instructions"), body.get("input")
    if instructions is not None and not isinstance(instructions, str):
        raise Refused("wrong_type", f"body.instructions must be a text, not {quote(instructions)}")
    first: list[dict[str, object]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if given is None:
        raise Refused("missing_prompt", "body.input is missing")
    if isinstance(given, str):
        return [*first, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise Refused("wrong_type", f"body.input must be a text or a list of messages, not {quote(given)}")
    return [*first, *(_message(item, f"body.input[{number}]") for number, item in enumerate(given))]


def _message(item: object, name: str) -> dict[str, object]:
    if not isinstance(item, Mapping):
        raise Refused("wrong_type", f"{name} must be an object with role and content, not {quote(item)}")
    kind, role, content = item.get("type"), item.get("role"), item.get("content")
    if kind not in (None, "message"):
        raise Refused("unknown_parameter", f'{name}: only items of type "message" are supported, not {quote(kind)}')
    if role not in _ROLES:
        raise Refused("wrong_type", f"{name}: role must be one of {', '.join(_ROLES)}, not {quote(role)}")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list):
        raise Refused("wrong_type", f"{name}: content must be a text or a list of text parts, not {quote(content)}")
    return {"role": role, "content": [_part(part, name) for part in content]}


def _part(part: object, name: str) -> dict[str, object]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or kind not in _PARTS or not isinstance(part.get("text"), str):
        raise Refused("wrong_type", f"{name}: {why_no_text(part, str(kind) if kind in _PARTS else _PARTS[0])}")
    return {"type": "text", "text": part["text"]}


def includes_logprobs(body: Mapping[str, object]) -> bool:
    """Whether `include` asks for the log-probabilities of the generated tokens.

    Raises:
        Refused: it asks for something else.
    """
    include = body.get("include") or []
    if not isinstance(include, list) or any(each != _LOGPROBS for each in include):
        raise Refused(
            "unknown_parameter",
            f"body.include is not supported: it must be [], [{quote(_LOGPROBS)}] or left out, not {_first(include)}",
        )
    return bool(include)


def _first(include: object) -> str:
    if not isinstance(include, list):
        return quote(include)
    return quote(next(each for each in include if each != _LOGPROBS))


def response(generation: Generation, digest: str, model: str, created: int) -> dict[str, object]:
    """OpenAI's Response object of a good generation.

    Args:
        digest: letters and digits that tell this answer from all others, for its ids.
        created: Unix time in whole seconds.
    """
    body = (generation.request or {}).get("body")
    settings = body if isinstance(body, Mapping) else {}
    cut_off = generation.finish_reason == "length"
    status = "incomplete" if cut_off else "completed"
    said = read_message(generation, digest)
    text: dict[str, object] = {"type": "output_text", "text": said.content, "annotations": []}
    if (logprobs := openai_logprobs.of_chat(generation)) is not None:
        text["logprobs"] = logprobs["content"]
    message = {"id": f"msg_{digest}", "type": "message", "role": "assistant", "status": status, "content": [text]}
    output = [message]
    if said.reasoning is not None:
        thought = {"type": "reasoning_text", "text": said.reasoning}
        output.insert(0, {"id": f"rs_{digest}", "type": "reasoning", "summary": [], "content": [thought]})
    return {
        "id": f"resp_{digest}",
        "object": "response",
        "created_at": created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut_off else None,
        "instructions": settings.get("instructions"),
        "max_output_tokens": settings.get("max_output_tokens"),
        "metadata": settings.get("metadata") or {},
        "model": model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "temperature": settings.get("temperature"),
        "text": _form(settings),
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": settings.get("top_logprobs"),
        "top_p": settings.get("top_p"),
        "truncation": "disabled",
        "usage": _usage(generation),
    }


def _form(body: Mapping[str, object]) -> dict[str, object]:
    """`text` of the body, which says what the text must be."""
    text = without_null_keys(body.get("text"))
    form = without_null_keys(text.get("format")) if isinstance(text, dict) else None
    return {"format": form or {"type": "text"}}


def _usage(generation: Generation) -> dict[str, object]:
    return {
        "input_tokens": generation.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": generation.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens(generation) or 0},
        "total_tokens": generation.prompt_tokens + generation.generated_tokens,
    }
