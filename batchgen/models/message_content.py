"""What a model's chat template takes as the content of a message: a text, a list of parts, or either.

Templates of text models take texts (`{{ message.content }}`), those of models that see often take parts
(`{% for part in message.content %}`). A template does not say which. One that gets the other form raises an error at
best; at worst it writes nothing, or Python's way of writing a list. So each role is tried out with short conversations,
and where that shows nothing, the template's syntax tree says whether it loops over the content.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from batchgen.requests.template import GENERATION_TAGS

if TYPE_CHECKING:
    from jinja2 import nodes

Message = Mapping[str, object]
Render = Callable[[Sequence[Message], Sequence[Message] | None], str]
"""Messages, and the tools they may call, through one template. Raises whatever a template raises."""

_ROLES = 64  # whose forms are remembered: rows may name any number
_FIRST, _SECOND = "zqfirst", "zqsecond"  # words that no template writes by itself
# A list of parts that was written as Python or as JSON instead of being read.
_WRITTEN_OUT = re.compile(rf"""['"]text\\?['"]\s*:\s*\\?['"](?:{_FIRST}|{_SECOND})""")
_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "What."}}},
    },
}
_RESULT: Message = {"tool_call_id": "abcdefghi", "name": "look"}  # of calling it


class Forms(NamedTuple):
    """The forms of content whose words a template writes into the prompt, for messages of one role."""

    texts: bool
    parts: bool
    one_part: bool  # the first of the parts alone; looked at only where the others fail


class ChatTemplate:
    """One chat template, which is given each content in a form that it takes.

    Args:
        source: the template's text.
        render: renders messages with it.
    """

    def __init__(self, source: str, render: Render) -> None:
        self._source = source
        self._render = render
        self._forms = lru_cache(_ROLES)(self._try_out)

    def fit(self, messages: Sequence[Message], *, with_tools: bool) -> list[dict[str, object]]:
        """The messages as the template takes them.

        Parts go as they are to a template that reads parts of this role, and to another joined by line breaks, as vLLM
        joins them. A text goes as it is unless the template reads parts alone. OpenAI's role `developer` is called
        `system` where the template knows the second and not the first.

        Raises:
            ValueError: several messages would have to be that one system message; a sentence.
        """
        roles = [one.get("role") for one in messages if one.get("content") is not None]
        if "developer" in roles and self._knows_no_developer(with_tools):
            if roles.count("developer") + roles.count("system") > 1:
                raise ValueError(
                    "the model's chat template does not know the role developer, and there is another message of the "
                    "role developer or system; make one message of them"
                )
            messages = [_rename_developer(one) for one in messages]
        return [self._fit(message, with_tools) for message in messages]

    def find_left_out(
        self, messages: Sequence[Message], text: str, render: Callable[[Sequence[Message]], str], *, with_tools: bool
    ) -> int | None:
        """The number of the first message whose words the template has left out of `text`; None: there is none.

        Not of an assistant's: which thoughts of earlier turns are kept, and whether something may be said beside a call
        of a tool, is the template's business.

        Args:
            messages: as `fit` gives them.
            text: what the template has made of them.
            render: renders messages as `text` was rendered.
        """
        for number, message in enumerate(messages):
            if message.get("role") == "assistant" or not _words_in(message.get("content")):
                continue
            # Of a role that the template knows, words are nearly always written as they are.
            known = any(self._forms(str(message.get("role")), with_tools))
            marked = _mark(message, text if known else "")
            if marked is None:
                continue
            try:
                shown = render([*messages[:number], marked, *messages[number + 1 :]])
            except Exception:  # about another text, a template may say anything
                continue
            if _FIRST not in shown:
                return number
        return None

    def _knows_no_developer(self, with_tools: bool) -> bool:
        return not any(self._forms("developer", with_tools)) and any(self._forms("system", with_tools))

    def _fit(self, message: Message, with_tools: bool) -> dict[str, object]:
        fitted = dict(message)
        role, content = str(message.get("role")), message.get("content")
        if content is None:
            return fitted
        forms = self._forms(role, with_tools)
        if not any(forms):
            forms = self._by_syntax()
        if not (forms.parts and isinstance(content, (list, tuple))):
            text = join_texts(content)
            fitted["content"] = text if forms.texts else [{"type": "text", "text": text}]
        return fitted

    def _try_out(self, role: str, with_tools: bool) -> Forms:
        """The forms that work for messages of this role where such a message may stand; none if nothing shows any."""
        text = f"{_FIRST} {_SECOND}"
        parts = [{"type": "text", "text": _FIRST}, {"type": "text", "text": _SECOND}]
        one_part = [{"type": "text", "text": text}]
        tools = [_TOOL] if with_tools else None
        for place in _conversations(role):
            texts, several = (self._writes(place(content), tools) for content in (text, parts))
            forms = Forms(texts, several, not (texts or several) and self._writes(place(one_part), tools))
            if any(forms):
                return forms
        return Forms(texts=False, parts=False, one_part=False)

    def _writes(self, messages: Sequence[Message], tools: Sequence[Message] | None) -> bool:
        """Whether both words come into the prompt."""
        try:
            text = self._render(messages, tools)
        except Exception:  # a template is a program that came with the model: it can raise anything
            return False
        return _FIRST in text and _SECOND in text and not _WRITTEN_OUT.search(text)

    def _by_syntax(self) -> Forms:
        parts = loops_over_content(self._source)
        # Whoever loops over a content mostly asks first whether it is a text.
        return Forms(texts=True, parts=parts, one_part=False)


def _rename_developer(message: Message) -> Message:
    says = message.get("role") == "developer" and message.get("content") is not None
    return {**message, "role": "system"} if says else message


def join_texts(content: object) -> str:
    """The texts of a list of parts, a line each, as vLLM joins them; a text as it is.

    Args:
        content: a text, or a list of parts of type "text".
    """
    if not isinstance(content, (list, tuple)):
        return str(content)
    return "\n".join(str(part.get("text", "")) for part in content)


def _words_in(content: object) -> str:
    return join_texts(content).strip() if content is not None else ""


def _mark(message: Message, text: str) -> Message | None:
    """The message with a word of ours in the place of each text of its content that `text` does not hold; None: it
    holds all of them."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return None if str(content).strip() in text else {**message, "content": _FIRST}
    marked = [part if str(part.get("text", "")).strip() in text else {**part, "text": _FIRST} for part in content]
    return None if marked == list(content) else {**message, "content": marked}


def _conversations(role: str) -> Iterator[Callable[[object], Sequence[Message]]]:
    """Places where a message may stand, each of which takes its content. Many templates want turns to alternate, or a
    result to follow a call."""
    user: Message = {"role": "user", "content": "Hello"}
    if role == "user":
        yield lambda content: [{"role": role, "content": content}]
        return
    if role != "assistant":
        yield lambda content: [{"role": role, "content": content}, user]
    if role == "developer":
        return  # stands first
    yield lambda content: [user, {"role": role, "content": content}, user]
    if role not in ("assistant", "system"):
        yield lambda content: [user, _call({"at": "sky"}), {**_RESULT, "role": role, "content": content}]
        yield lambda content: [user, _call('{"at": "sky"}'), {**_RESULT, "role": role, "content": content}]


def _call(arguments: object) -> Message:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def loops_over_content(source: str) -> bool:
    """Whether the template has a loop over the content of a message, be it through a variable or a filter."""
    from jinja2 import TemplateError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(GENERATION_TAGS.sub("", source))
    except (TemplateError, RecursionError):
        return False
    names = {"content"}  # also what macros call it
    assignments = list(tree.find_all(nodes.Assign))
    for _ in assignments:  # one may be of another's name
        for each in assignments:
            if isinstance(each.target, nodes.Name) and _is_content(each.node, names):
                names.add(each.target.name)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    from jinja2 import nodes

    if isinstance(node, nodes.Filter):
        return _is_content(node.node, names)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _is_content(node.node, names)
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Name) and node.name in names
