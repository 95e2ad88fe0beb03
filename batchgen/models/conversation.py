"""A model's chat template at work: conversations to texts, and where the assistant's turn begins in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from batchgen.models.call_arguments import CallArguments
from batchgen.models.message_content import ChatTemplate, Message, join_texts
from batchgen.requests.refusal import quote
from batchgen.requests.thinking import marks_in_template

_TEMPLATES = 64  # that are kept ready: rows may bring any number
_END = "zqcontinue"  # a word that no template writes by itself


class Conversations:
    """Renders conversations for one model.

    Args:
        folder: of the model, for sentences.
        hf_tokenizer: its Transformers tokenizer, which has its templates.
    """

    def __init__(self, folder: str, hf_tokenizer: Any) -> None:
        self._folder = folder
        self._hf_tokenizer = hf_tokenizer
        self._ready = lru_cache(_TEMPLATES)(_Template)

    def chat(self, messages: Sequence[Message], **kwargs: object) -> str:
        """Returns the conversation as a text; see `engine.Tokenizer.chat`.

        A content may be a text or a list of parts of type "text", and the arguments of a call an object or JSON of one:
        they become what the template takes.
        """
        template, options, continues = self._prepare(kwargs)
        with_tools = bool(options.get("tools"))
        fitted = template.fit(messages, with_tools)
        try:
            text = self._continued(template, fitted, options) if continues else template.render(fitted, **options)
        except RefusedToContinue:
            raise
        except Exception as error:  # a template is a program that came with the model: it can raise anything
            detail = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"{template.owner} chat template refused these messages: {detail}") from error
        render = partial(template.render, **options)
        place = template.content.find_left_out(fitted, text, render, with_tools=with_tools)
        if place is not None:
            raise ValueError(
                f"{template.owner} chat template leaves out what message {place + 1} of {len(fitted)} says, whose role "
                f"is {quote(fitted[place].get('role'))}. Give it a role and a place that the template knows"
            )
        return text

    def template_text(self, **kwargs: object) -> str:
        """Returns the text of the template that `chat` takes; of several, by the names that Transformers has.

        Raises:
            ValueError: the model has none.
        """
        own = kwargs.get("chat_template")
        if own is not None:
            return str(own)
        templates = self._hf_tokenizer.chat_template
        if not templates:
            raise ValueError(
                f"the model in {self._folder} has no chat template, so it cannot take messages; "
                "give the text as `prompt`, or render it with --template"
            )
        if isinstance(templates, str):
            return templates
        name = "tool_use" if kwargs.get("tools") is not None and "tool_use" in templates else "default"
        if name not in templates:
            raise ValueError(
                f"the model in {self._folder} has chat templates named {', '.join(sorted(templates))}, and none named "
                "default; give the text as `prompt`, or render it with --template"
            )
        return str(templates[name])

    def find_turn(self, text: str, messages: Sequence[Message], **kwargs: object) -> str:
        """Returns the end of `text` that belongs to the assistant's next turn; see `engine.Tokenizer.find_turn`.

        It is what the template writes beyond the messages before that turn.
        """
        template, options, continues = self._prepare(kwargs)
        if not (continues or options["add_generation_prompt"]):
            return ""
        fitted = template.fit(messages, bool(options.get("tools")))
        before = fitted[:-1] if continues else fitted
        try:
            base = template.render(before, **{**options, "add_generation_prompt": False})
        except Exception:  # about another conversation, a template may say anything
            base = text
        shared = _shared_length(text, base)
        if shared < len(base):  # not within a mark
            opening = max(text.rfind("<", 0, shared), text.rfind("[", 0, shared))
            if opening >= 0 and not any(closing in text[opening:shared] for closing in ">]"):
                shared = opening
        if shared == len(text) and before:  # the template begins the turn unasked
            words = join_texts(before[-1].get("content") or "").strip()
            shared = max(text.rfind(words), 0) + len(words)
        return text[shared:]

    def _prepare(self, kwargs: Mapping[str, object]) -> tuple[_Template, dict[str, Any], bool]:
        """The template for these variables, what it is rendered with, and whether the last message goes on."""
        source, is_own = self.template_text(**kwargs), kwargs.get("chat_template") is not None
        template = self._ready(source, is_own, self._hf_tokenizer)
        options = {"add_generation_prompt": True, **kwargs}
        options.pop("chat_template", None)
        continues = bool(options.pop("continue_final_message", False))
        if continues:
            options["add_generation_prompt"] = False
        return template, options, continues

    def _continued(self, template: _Template, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        """The conversation up to the end of its last message, which the model goes on with.

        Raises:
            RefusedToContinue: the template writes that message in other words, or ends its thinking first.
        """
        *before, last = messages
        words, marked = _marked(last)
        text = template.render([*before, marked], **options)
        end = text.rfind(_END)
        written = text[: max(end, 0)]
        if end < 0 or not words or not written.endswith((words, words.lstrip())):
            raise RefusedToContinue(
                f"{template.owner} chat template writes the last message in other words than it has, so that the model "
                "cannot go on with it. Give it a content that the template leaves as it is"
            )
        marks = marks_in_template(template.source)
        header = written.removesuffix(words) if written.endswith(words) else written.removesuffix(words.lstrip())
        try:
            begun = template.render(before, **{**options, "add_generation_prompt": True})
        except Exception:  # about another conversation, a template may say anything
            begun = header
        own = header[_shared_length(header, begun) :]
        if marks is not None and (marks.start in own or marks.end in own):
            raise RefusedToContinue(
                f"{template.owner} chat template writes thinking before the last message, so that the model would "
                "go on with another text than was meant. Turn thinking off (enable_thinking false, where the template "
                "knows it), or leave continue_final_message out"
            )
        return written


class RefusedToContinue(ValueError):
    """The last message of a conversation cannot be gone on with; a sentence."""


class _Template:
    """One chat template of a model, or of a row."""

    def __init__(self, source: str, is_own: bool, hf_tokenizer: Any) -> None:
        self.source = source
        self.owner = "the row's" if is_own else "the model's"
        self._hf_tokenizer = hf_tokenizer
        self.render: Callable[..., str] = _own_renderer(source, hf_tokenizer) if is_own else self._render
        self.content = ChatTemplate(source, self._try_out)
        self._arguments = CallArguments(self._try_out)

    def fit(self, messages: Sequence[Message], with_tools: bool) -> list[dict[str, object]]:
        """The messages as the template takes them."""
        return self.content.fit(self._arguments.fit(messages, with_tools=with_tools), with_tools=with_tools)

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        copied = [dict(message) for message in messages]
        rendered = self._hf_tokenizer.apply_chat_template(
            copied, **{**options, "tokenize": False, "chat_template": self.source}
        )
        return str(rendered)

    def _try_out(self, messages: Sequence[Message], tools: Sequence[Message] | None) -> str:
        return self.render(messages, tools=tools, add_generation_prompt=True)


def _own_renderer(source: str, hf_tokenizer: Any) -> Callable[..., str]:
    """Renders by a row's own template, in a sandbox with limits."""
    from batchgen.requests.sandbox import ChatSandbox  # imports jinja2, which most runs do without

    environment = ChatSandbox()
    template = environment.from_chat_template(source)

    def render(messages: Sequence[Message], **options: Any) -> str:
        variables = {**hf_tokenizer.special_tokens_map, "tools": None, "documents": None, **options}
        return environment.render(template, {**variables, "messages": [dict(message) for message in messages]})

    return render


def _shared_length(text: str, other: str) -> int:
    """How many characters both begin with."""
    if text.startswith(other):
        return len(other)
    pairs = zip(text, other, strict=False)
    return next((place for place, (one, another) in enumerate(pairs) if one != another), min(len(text), len(other)))


def _marked(message: Message) -> tuple[str, Message]:
    """The last text of a message, and the message with a word of ours behind it."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        text = "" if content is None else str(content)
        return text, {**message, "content": text + _END}
    text = str(content[-1].get("text", "")) if content else ""
    return text, {**message, "content": [*content[:-1], {**(content[-1] if content else {}), "text": text + _END}]}
