"""Conversations to texts: what a body or a plain row says beside its messages, and what the model may then write.

Pure: the tokenizer renders.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from batchgen.engine import Tokenizer
from batchgen.requests import tools
from batchgen.requests.recipe import Recipe
from batchgen.requests.refusal import Refused, quote
from batchgen.requests.template import template_kwargs
from batchgen.requests.thinking import Marks, marks_in_template, marks_of, thinking_of
from batchgen.requests.tools import offers
from batchgen.requests.tools.offers import Offer, read_offer
from batchgen.types import Markup, SamplingParams, Thinking

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""What `reasoning_effort` may be."""

KEYS = offers.KEYS | {
    *("chat_template_kwargs", "documents", "enable_thinking", "reasoning_effort", "include_reasoning"),
    *("continue_final_message", "add_generation_prompt", "chat_template"),
}
"""What is read here, of bodies for chats and of plain rows with messages."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What one row says to a chat template."""

    messages: Sequence[Mapping[str, object]]
    variables: Mapping[str, object]  # of the template, its documents among them, without its tools
    offer: Offer | None  # the tools that the model may call; None: there are none
    continues: bool  # the model goes on with the last message
    begins_turn: bool  # the prompt ends with the beginning of the assistant's turn
    template: str | None  # its own; None: the model's


def read_conversation(
    given: Mapping[str, object], messages: Sequence[Mapping[str, object]], prefix: str
) -> Conversation:
    """What a body or a plain row with these messages says.

    Args:
        prefix: what stands before the keys in sentences: "body." or nothing.

    Raises:
        Refused: a key is of the wrong type, or contradicts another.
    """
    variables = template_kwargs(given.get("chat_template_kwargs"), f"{prefix}chat_template_kwargs")
    variables = {**_thinking_variables(given, prefix), **_documents(given, prefix), **variables}
    continues = _flag(given, "continue_final_message", False, prefix)
    begins = _flag(given, "add_generation_prompt", not continues, prefix)
    if continues and begins:
        raise Refused(
            "wrong_type",
            f"{prefix}continue_final_message and {prefix}add_generation_prompt are both true, but a text either goes "
            "on with the last message or begins a new one",
        )
    if continues and messages[-1].get("role") != "assistant":
        raise Refused(
            "wrong_type",
            f"{prefix}continue_final_message needs a last message of the role assistant, "
            f"not {quote(messages[-1].get('role'))}",
        )
    template = given.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise Refused("wrong_type", f"{prefix}chat_template must be a text, not {quote(template)}")
    _flag(given, "include_reasoning", True, prefix)
    return Conversation(messages, variables, read_offer(given, prefix), continues, begins, template)


def _flag(given: Mapping[str, object], key: str, default: bool, prefix: str) -> bool:
    value = given.get(key)
    if value is not None and not isinstance(value, bool):
        raise Refused("wrong_type", f"{prefix}{key} must be true or false, not {quote(value)}")
    return default if value is None else value


def _thinking_variables(given: Mapping[str, object], prefix: str) -> dict[str, object]:
    """What the template is told of thinking: without an effort, there is none."""
    variables: dict[str, object] = {}
    effort = given.get("reasoning_effort")
    if effort is not None:
        if effort not in EFFORTS:
            raise Refused(
                "wrong_type", f"{prefix}reasoning_effort must be one of {', '.join(EFFORTS)}, not {quote(effort)}"
            )
        variables |= {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    if given.get("enable_thinking") is not None:
        variables["enable_thinking"] = _flag(given, "enable_thinking", True, prefix)
    return variables


def _documents(given: Mapping[str, object], prefix: str) -> dict[str, object]:
    documents = given.get("documents")
    if documents is None or documents == []:
        return {}
    if not isinstance(documents, list) or not all(isinstance(document, Mapping) for document in documents):
        remedy = "" if prefix else ". Call the column otherwise if it is not meant for the chat template"
        raise Refused("wrong_type", f"{prefix}documents must be a list of objects with title and text{remedy}")
    return {"documents": documents}


class Conversations:
    """Renders conversations through a model's chat template, and says what the model may write then.

    Args:
        recipe: what the user has asked for, for the whole run.
        tokenizer: the model's.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._turn = ""  # how the last row began the assistant's turn, where marks stood in its prompt

    def render(self, conversation: Conversation) -> tuple[str, Markup | None]:
        """The text of a prompt, and what the model may write beside the answer; None: nothing that is known here.

        Raises:
            Refused: the template refuses the conversation or leaves a part of it out, or may not be used.
        """
        if conversation.template is not None and not self._recipe.trusts_templates:
            raise Refused(
                "template",
                "the row brings a chat template of its own, which is a program: start the run with --trust-templates "
                "to have it rendered, or leave chat_template out",
            )
        offer = conversation.offer
        variables: dict[str, object] = {**self._recipe.chat_template_kwargs, **conversation.variables}
        if offer is not None:
            variables["tools"] = list(offer.definitions)
        if conversation.template is not None:
            variables["chat_template"] = conversation.template
        options = {**variables, **({"continue_final_message": True} if conversation.continues else {})}
        if not conversation.begins_turn:
            options["add_generation_prompt"] = False
        try:
            text = self._tokenizer.chat(conversation.messages, **options)
            template = self._tokenizer.template_text(**variables)
            if template is None:
                return text, None
            _check_reads(template, offer, variables)
            marks = self._marks(template)
            turn = "" if marks is None else self._find_turn(text, conversation, marks, options)
        except (ValueError, RecursionError) as error:
            raise Refused("template", str(error)) from error
        return text, self._markup(template, offer, marks, turn)

    def leaves_calls_in_text(self, conversation: Conversation, markup: Markup | None) -> bool:
        """Whether the model may call tools in a form that its template does not show, after `render` gave `markup`."""
        offer = conversation.offer
        if offer is None or offer.is_forced or self._recipe.tool_parser != "auto" or (markup and markup.tools):
            return False
        return conversation.template is not None or self._tokenizer.template_text() is not None

    def _find_turn(self, text: str, conversation: Conversation, marks: Marks, options: Mapping[str, object]) -> str:
        """The end of the prompt that is the assistant's, as far as marks of thinking stand in it."""
        if marks.start not in text and marks.end not in text:
            return ""
        if not conversation.begins_turn:
            return self._tokenizer.find_turn(text, conversation.messages, **options)
        # Most rows of a run begin the turn alike, and to find it, they are rendered once more.
        begin = text.removesuffix(self._turn)
        if not self._turn or len(begin) == len(text) or marks.start in begin or marks.end in begin:
            self._turn = self._tokenizer.find_turn(text, conversation.messages, **options)
        return self._turn

    def _marks(self, template: str) -> Marks | None:
        parser = self._recipe.reasoning_parser
        if parser == "none":
            return None
        return marks_in_template(template) if parser == "auto" else marks_of(parser)

    def _markup(self, template: str, offer: Offer | None, marks: Marks | None, turn: str) -> Markup | None:
        form = None
        if offer is not None and offer.is_forced:
            form = offer.form
        elif offer is not None and self._recipe.tool_parser != "none":
            parser = self._recipe.tool_parser
            form = tools.form_of_template(template) if parser == "auto" else tools.resolve(parser)
        may_call = offer is not None and not offer.is_forced
        thinking = None if marks is None else thinking_of(marks, turn, may_call=may_call)
        return None if thinking is None and form is None else _shared_markup(thinking, form)


@lru_cache(1024)
def _shared_markup(thinking: Thinking | None, form: str | None) -> Markup:
    return Markup(thinking, form)


def _check_reads(template: str, offer: Offer | None, variables: Mapping[str, object]) -> None:
    """Refuses what a template would leave out without a word."""
    for name, is_given in (("tools", offer is not None), ("documents", bool(variables.get("documents")))):
        if is_given and not re.search(rf"\b{name}\b", template):
            raise ValueError(
                f"the model's chat template knows no {name}, so that the model would not see them. Leave {name} out, "
                "or take a model that was made for them"
            )


def constrained(params: SamplingParams, conversation: Conversation, prefix: str) -> SamplingParams:
    """`params` with what a row must write that must call a tool; that takes the place of any other constraint.

    Raises:
        Refused: the row may call tools and must write something else, or the schema of a tool cannot be enforced.
    """
    offer = conversation.offer
    if offer is None:
        return params
    if offer.is_forced:
        return dataclasses.replace(params, constraint=offer.constraint(prefix))
    if params.constraint is not None:
        raise Refused(
            "unknown_parameter",
            f"{prefix}tools cannot be called in a text that is constrained to a {params.constraint.kind}: set "
            f'{prefix}tool_choice to "none" or "required", or leave the constraint out',
        )
    return params
