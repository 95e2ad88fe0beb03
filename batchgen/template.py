"""What templates are given: conversations and variables for a model's chat template, columns for `--template`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from batchgen.refusal import Refused, shown


def conversation(messages: object, name: str, *, whole: bool) -> list[dict[str, object]]:
    """`messages` as a chat template takes them: text parts joined, nulls left out.

    With `whole`, keys beyond role and content go to the template as they stand (its author's business); without, tool
    calls are refused, since OpenAI's form of them is not what templates expect.

    Raises:
        Refused: `name` (for the sentence) is not a list of messages of text.
    """
    if messages is None:
        raise Refused("missing_prompt", f"{name} is missing")
    if not isinstance(messages, list) or not messages:
        raise Refused("wrong_type", f"{name} must be a list of messages, not {shown(messages)}")
    return [_message(message, f"{name}[{number}]", whole) for number, message in enumerate(messages)]


def _message(message: object, name: str, whole: bool) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise Refused("wrong_type", f"{name} must be an object with role and content, not {shown(message)}")
    given = {key: value for key, value in message.items() if value is not None}
    if not isinstance(given.get("role"), str):
        raise Refused("wrong_type", f"{name}: role must be a text, not {shown(given.get('role'))}")
    if not whole:
        for key in ("tool_calls", "function_call", "audio"):
            if given.get(key):
                raise Refused("unknown_parameter", f"{name}: {key} is not supported")
    # A call of a tool has no text of its own.
    if "content" in given or not given.get("tool_calls"):
        given["content"] = _content(given.get("content"), name)
    return given


def _content(content: object, name: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused("wrong_type", f"{name}: content must be a text or a list of text parts, not {shown(content)}")
    texts = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (part, None)
        if kind != "text" or not isinstance(text, str):
            raise Refused("wrong_type", f'{name}: content may hold parts of type "text" only, not {shown(kind)}')
        texts.append(text)
    # As vLLM joins them for templates that take text.
    return "\n".join(texts)


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
        raise Refused("wrong_type", f"{name} must be an object, not {shown(kwargs)}")
    for key in kwargs:
        if not isinstance(key, str) or key in _RESERVED_KWARGS:
            raise Refused("unknown_parameter", f"{name} may not set {shown(key)}: it is no variable of a chat template")
    return {key: value for key, value in kwargs.items() if value is not None}


def compiled(template: str) -> Callable[[Mapping[str, object]], str]:
    """The Jinja template as a function of a row's columns, which raises `Refused`.

    A column that is missing is an error, and so is one that would be written "None". What else a template may not do
    says `sandbox`.

    Raises:
        ValueError: it is no Jinja template; a sentence.
    """
    from jinja2 import TemplateSyntaxError

    from batchgen.sandbox import Sandbox  # imports jinja2, which most runs do without

    environment = Sandbox()
    try:
        jinja = environment.from_string(template)
    except TemplateSyntaxError as error:
        raise ValueError(f"--template is no Jinja template: line {error.lineno}: {error.message}") from error
    except Exception as error:  # nested too deeply for Python, a number of too many digits
        raise ValueError(f"--template cannot be used: {_brief(error)}. Make it simpler") from error

    def render(columns: Mapping[str, object]) -> str:
        try:
            return environment.text_of(jinja, columns)
        except Refused:
            raise
        except Exception as error:  # an expression over the row's values: whatever Python's operators raise
            raise Refused("template", f"the template failed: {_brief(error)}") from error

    return render


def _brief(error: Exception) -> str:
    """The error on one line, whatever values it shows."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
