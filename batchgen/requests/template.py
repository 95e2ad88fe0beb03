"""What templates are given: conversations and variables for a model's chat template, columns for `--template`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from batchgen.requests.refusal import Refused, quote

GENERATION_TAGS = re.compile(r"{%[-+]?\s*(?:end)?generation\s*[-+]?%}")
"""Tags that Transformers adds to Jinja in chat templates; they change no prompt."""

# What other kinds of parts hold, in the words of OpenAI's requests and of Transformers' templates.
_SEEN_OR_HEARD = {
    **dict.fromkeys(("image", "image_url", "input_image", "image_file"), "images are"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio is"),
    **dict.fromkeys(("video", "video_url", "input_video"), "videos are"),
    **dict.fromkeys(("file", "input_file"), "files are"),
}
# What a message may hold in the place of a content.
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def conversation(messages: object, name: str, *, whole: bool) -> list[dict[str, object]]:
    """`messages` as `Tokenizer.chat` takes them: a content is a text or a list of text parts, nulls are left out.

    Keys beyond role and content go to the template as they stand: what they mean is its author's business. In bodies
    (without `whole`), calls of tools must have OpenAI's form, and what is of another kind than text is refused.

    Raises:
        Refused: `name` (for the sentence) is not a list of messages of text.
    """
    if messages is None:
        raise Refused("missing_prompt", f"{name} is missing")
    if not isinstance(messages, list) or not messages:
        raise Refused("wrong_type", f"{name} must be a list of messages, not {quote(messages)}")
    return [_message(message, f"{name}[{number}]", whole) for number, message in enumerate(messages)]


def _message(message: object, name: str, whole: bool) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise Refused("wrong_type", f"{name} must be an object with role and content, not {quote(message)}")
    given = _given(message)
    if not isinstance(given.get("role"), str):
        raise Refused("wrong_type", f"{name}: role must be a text, not {quote(given.get('role'))}")
    if not whole:
        _check_calls(given.get("tool_calls"), name)
        for key, instead in (("function_call", ": write it into tool_calls"), ("audio", "")):
            if given.get(key):
                raise Refused("unknown_parameter", f"{name}: {key} is not supported{instead}")
    if "content" in given or not any(given.get(key) for key in _INSTEAD_OF_CONTENT):
        given["content"] = _content(given.get("content"), name)
    return given


def _check_calls(calls: object, name: str) -> None:
    """Checks that the calls of a message are OpenAI's: functions, whose arguments are an object or JSON of one."""
    if calls is None:
        return
    if not isinstance(calls, list):
        raise Refused("wrong_type", f"{name}: tool_calls must be a list, not {quote(calls)}")
    for number, call in enumerate(calls):
        place = f"{name}.tool_calls[{number}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(function, Mapping):
            raise Refused("wrong_type", f"{place} must be an object with id, type and function")
        if call.get("type", "function") != "function":
            raise Refused("unknown_parameter", f'{place}: type must be "function", not {quote(call["type"])}')
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise Refused("wrong_type", f"{place}: function.name must be a text, not {quote(function.get('name'))}")
        if not isinstance(function.get("arguments", ""), (str, Mapping)):
            raise Refused(
                "wrong_type",
                f"{place}: function.arguments must be JSON of an object, not {quote(function['arguments'])}",
            )


def _given(message: Mapping[str, object]) -> dict[str, object]:
    """The message without what is null in it, and in its calls of tools; what a call passes on stays as it is."""
    given = {key: value for key, value in message.items() if value is not None}
    calls = given.get("tool_calls")
    if calls == []:
        # vLLM answers so where nothing was called, and some templates then leave the content out.
        del given["tool_calls"]
    elif isinstance(calls, list):
        given["tool_calls"] = [_call(call) for call in calls]
    return given


def _call(call: object) -> object:
    kept = without_null_keys(call)
    if isinstance(kept, dict) and "function" in kept:
        kept["function"] = without_null_keys(kept["function"])
    return kept


def _content(content: object, name: str) -> str | list[dict[str, object]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused("wrong_type", f"{name}: content must be a text or a list of text parts, not {quote(content)}")
    parts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refused("wrong_type", f"{name}: {why_no_text(part)}")
        parts.append({key: value for key, value in part.items() if value is not None})
    return parts


def why_no_text(part: object, kind: str = "text") -> str:
    """The end of a sentence about a part of a content that is none of type `kind` with a text."""
    part_type = part.get("type") if isinstance(part, Mapping) else part
    if isinstance(part, Mapping) and part_type == kind:
        return f'the text of a part of type "{kind}" must be a text, not {quote(part.get("text"))}'
    other = _SEEN_OR_HEARD.get(part_type) if isinstance(part_type, str) else None
    return f'content may hold parts of type "{kind}" only, not {quote(part_type)}' + (
        f": {other} not supported yet" if other else ""
    )


def without_null_keys(value: object) -> object:
    """`value`, if it is an object, without the keys that are null."""
    return {key: each for key, each in value.items() if each is not None} if isinstance(value, Mapping) else value


def without_nulls(value: object) -> object:
    """`value` without the keys that are null, at every depth: where a format forces every object to have every key,
    null means that the key was not given. A null in a list stays."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return value


# What the call of the template itself sets.
_RESERVED_KWARGS = frozenset(
    {
        *("add_generation_prompt", "continue_final_message", "tokenize", "chat_template", "messages", "conversation"),
        "sanitize_control_tokens",
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("self", "tokenizer_kwargs"),
    }
)


def template_kwargs(kwargs: object, name: str) -> dict[str, object]:
    """Variables for the chat template, nulls left out.

    Raises:
        Refused: `name` (for the sentence) is not an object, or sets what is not the template's own.
    """
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise Refused("wrong_type", f"{name} must be an object, not {quote(kwargs)}")
    for key in kwargs:
        if not isinstance(key, str) or key in _RESERVED_KWARGS:
            raise Refused("unknown_parameter", f"{name} may not set {quote(key)}: it is no variable of a chat template")
    return {key: value for key, value in kwargs.items() if value is not None}


def compile_template(template: str) -> Callable[[Mapping[str, object]], str]:
    """The Jinja template as a function of a row's columns, which raises `Refused`.

    A column that is missing is an error, and so is one that would be written "None". `sandbox` says what else a row may
    not ask for.

    Raises:
        ValueError: it is no Jinja template; a sentence.
    """
    from jinja2 import TemplateSyntaxError

    from batchgen.requests.sandbox import Sandbox  # imports jinja2, which most runs do without

    environment = Sandbox()
    try:
        jinja = environment.from_string(template)
    except TemplateSyntaxError as error:
        raise ValueError(f"--template is no Jinja template: line {error.lineno}: {error.message}") from error
    except Exception as error:  # nested too deeply for Python, a number of too many digits
        raise ValueError(f"--template cannot be used: {_brief(error)}. Make it simpler") from error

    def render(columns: Mapping[str, object]) -> str:
        try:
            return environment.render(jinja, columns)
        except Refused:
            raise
        except Exception as error:  # an expression over the row's values: whatever Python's operators raise
            raise Refused("template", f"the template failed: {_brief(error)}") from error

    return render


def _brief(error: Exception) -> str:
    """The error on one line, whatever values it shows."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
