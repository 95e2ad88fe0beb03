"""Rows to prompts: the chat template or `--template`, per-row parameters, tokens; or what is wrong with a row.

Pure but for one warning a key: everything it knows comes in as arguments. A row is, in this order, an OpenAI request
line, a text rendered by `--template`, the text in `--prompt-column`, a conversation in `messages`, or the text in
`prompt`. JSON null is "not given" everywhere, since in Parquet every row has every column.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from batchgen import openai
from batchgen.engine import Encoder
from batchgen.refusal import Refused, check_encodable, refuse_lost, sampling_params, shown
from batchgen.template import compiled, conversation, template_kwargs
from batchgen.types import Generation, Prompt, Row, RowError, SamplingParams, Tokens

_log = logging.getLogger(__name__)

_PARAMS = frozenset(param.name for param in dataclasses.fields(SamplingParams))
_DEFAULT_MOST = SamplingParams().max_new_tokens
# Keys of a request's body that somebody who puts them into a plain row takes for settings.
_OF_REQUESTS = frozenset({"max_tokens", "max_completion_tokens", "response_format", "tools", "frequency_penalty"})


@dataclass(frozen=True)
class Recipe:
    """How rows become prompts: what the user asked for, recorded with the run and compared at its next start.

    Raises:
        ValueError: the settings exclude each other; a sentence.
    """

    prompt_column: str | None = None  # None: prompt, or messages where a row has them
    template: str | None = None  # Jinja text over the row's columns
    sampling: SamplingParams = field(default_factory=SamplingParams)  # for what a row does not set itself
    truncate: Literal["left", "right"] | None = None  # the side cut off a prompt that is too long; None: an error row
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)  # a row's own win
    model: str | None = None  # every row must be a request line, for this model or none; None: any row, any model

    def __post_init__(self) -> None:
        if self.template is not None and self.prompt_column is not None:
            raise ValueError("--template and --prompt-column exclude each other: the template can use any column")
        try:
            template_kwargs(self.chat_template_kwargs, "chat_template_kwargs")
        except Refused as refused:
            raise ValueError(refused.message) from None


def own_id(value: Mapping[str, object] | RowError) -> str | None:
    """The row's `id` or `custom_id`, if it has a valid one."""
    if isinstance(value, RowError):
        return None
    try:
        return _own_id(value)
    except Refused:
        return None


def row_id(row: Row) -> str:
    """The row's own id, else one from its file and line."""
    return own_id(row.value) or f"{row.source}:{row.line}"


def _own_id(columns: Mapping[str, object]) -> str | None:
    own = columns.get("id")
    if type(own) is str and own and "body" not in columns:
        return own  # nearly every row: the rest only says the same more slowly
    if openai.is_request(columns):
        own = columns.get("custom_id")
        # `parse` says what is wrong with another one.
        return own if isinstance(own, str) and own else None
    name, own = "id", columns.get("id")
    if own is None:
        name, own = "custom_id", columns.get("custom_id")
    if own is None or (isinstance(own, str) and own):
        return own
    if isinstance(own, float) and own.is_integer():  # a Parquet column of whole numbers with gaps
        own = int(own)
    # Beyond some thousand digits Python refuses to write a number.
    if isinstance(own, int) and not isinstance(own, bool) and own.bit_length() <= 4096:
        return str(own)
    raise Refused("wrong_type", f"{name} must be a text that is not empty or a whole number, not {shown(own)}")


class PromptReader:
    """Turns rows into prompts, and rows with which something is wrong into failed generations.

    Args:
        duplicates: numbers of rows whose id an earlier row has, and that row's place.

    Raises:
        ValueError: the template is no Jinja template; a sentence.
    """

    def __init__(self, recipe: Recipe, encoder: Encoder, duplicates: Mapping[int, str]) -> None:
        self._recipe = recipe
        self._encoder = encoder
        self._duplicates = duplicates
        self._render = None if recipe.template is None else compiled(recipe.template)
        self._reported: set[tuple[str, str | int]] = set()

    def read(self, rows: Sequence[Row]) -> list[Prompt | Generation]:
        """A window of rows, in their order. Calls the tokenizer at most twice, however many rows there are."""
        plain: list[Prompt] = []  # for the tokenizer to add its special tokens to
        templated: list[Prompt] = []  # a chat template's text has them
        outcomes = [self._draft(row, plain, templated) for row in rows]
        for prompts, special in ((plain, True), (templated, False)):
            if prompts:
                tokens = self._encoder.tokenize([prompt.text for prompt in prompts], special=special)
                for prompt, ids in zip(prompts, tokens, strict=True):
                    prompt.tokens = ids
        return [
            self._checked(row, outcome) if isinstance(outcome, Prompt) else outcome
            for row, outcome in zip(rows, outcomes, strict=True)
        ]

    def _draft(self, row: Row, plain: list[Prompt], templated: list[Prompt]) -> Prompt | Generation:
        """The row's prompt, put into the list of those that need tokens, or its failure."""
        value = row.value
        if isinstance(value, RowError):
            return Generation(row.index, row_id(row), None, None, 0, 0, value, {})
        try:
            if row.index in self._duplicates:
                first = self._duplicates[row.index]
                raise Refused("duplicate_id", f"the id {shown(row_id(row))} is that of {first}")
            is_request = self._recipe.model is not None or openai.is_request(value)
            prompt, from_chat = self._request(row, value) if is_request else self._plain(row, value)
        except Refused as refused:
            return self._failed(row, refused)
        if from_chat is not None:
            (templated if from_chat else plain).append(prompt)
        return prompt

    def _plain(self, row: Row, value: Mapping[str, object]) -> tuple[Prompt, bool]:
        """The prompt, and whether its text is from a chat template."""
        own = _own_id(value)
        from_chat = False
        if self._render is not None:
            text = self._render(value)
        elif self._recipe.prompt_column is None and value.get("messages") is not None:
            from_chat = True
            text = self._chat(
                conversation(value["messages"], "messages", whole=True),
                template_kwargs(value.get("chat_template_kwargs"), "chat_template_kwargs"),
            )
        else:
            text = _text(value, self._recipe.prompt_column)
        params = self._recipe.sampling
        if not _OF_REQUESTS.isdisjoint(value):
            for key in _OF_REQUESTS.intersection(value):
                self._say_once(row, "the column %s is carried along and changes no text", key)
        if not _PARAMS.isdisjoint(value):
            given = {name: value[name] for name in _PARAMS if value.get(name) is not None}
            if isinstance(given.get("logprobs"), list):
                del given["logprobs"]  # what another run has put out, which is the input of this one
            params = sampling_params(params, given, {})
        if not text.isascii():
            check_encodable(text)
        id = f"{row.source}:{row.line}" if own is None else own
        return Prompt(row.index, id, row.line, text, (), params, value), from_chat

    def _request(self, row: Row, value: Mapping[str, object]) -> tuple[Prompt, bool | None]:
        """The prompt, and whether its text is from a chat template; None if it brought its tokens along."""
        request = openai.parse(value, self._recipe.model)
        self._report(row, request.ignored)
        if "max_new_tokens" not in request.sampling and (most := self._recipe.sampling.max_new_tokens) == _DEFAULT_MOST:
            self._say_once(row, "the body sets no max_tokens: its answer ends after %s tokens", most)
        params = sampling_params(self._recipe.sampling, request.sampling, request.spelled)
        text = request.text or ""
        if request.messages is not None:
            text = self._chat(request.messages, request.chat_template_kwargs)
        check_encodable(text)
        if request.tokens is not None:
            self._check_vocabulary(request.tokens)
        prompt = Prompt(row.index, row_id(row), row.line, text, request.tokens or (), params, {}, value)
        return prompt, None if request.tokens is not None else request.messages is not None

    def _chat(self, messages: Sequence[Mapping[str, object]], kwargs: Mapping[str, object]) -> str:
        try:
            return self._encoder.chat(messages, **{**self._recipe.chat_template_kwargs, **kwargs})
        except (ValueError, RecursionError) as error:
            raise Refused("template", str(error)) from error

    def _report(self, row: Row, ignored: Sequence[str]) -> None:
        for key in ignored:
            self._say_once(row, "the body's key %s is not known to batchgen and is ignored", key)

    def _say_once(self, row: Row, sentence: str, value: str | int) -> None:
        if (sentence, value) not in self._reported:
            self._reported.add((sentence, value))
            _log.warning(f"%s: {sentence}, here and in all other lines", _place(row), shown(value))

    def _check_vocabulary(self, tokens: Tokens) -> None:
        size = self._encoder.vocabulary
        largest = max(tokens, default=0)
        if size is not None and largest >= size:
            raise Refused("wrong_type", f"body.prompt has token {shown(largest)}, but the model has {size} tokens")

    def _checked(self, row: Row, prompt: Prompt) -> Prompt | Generation:
        """`prompt`, which has its tokens now, or why it cannot be generated from."""
        tokens, budget = prompt.tokens, prompt.params.max_new_tokens
        context = self._encoder.context
        if not tokens:
            return self._failed(row, Refused("empty_prompt", "the prompt is empty: it has no tokens"))
        if lost := self._encoder.find_lost(prompt.text):
            return self._failed(row, refuse_lost(lost))
        if context is not None and len(tokens) + budget > context:
            try:
                prompt.tokens = self._shortened(tokens, budget, context)
            except Refused as refused:
                return self._failed(row, refused)
        return prompt

    def _shortened(self, tokens: Tokens, budget: int, context: int) -> Tokens:
        """`tokens` cut to leave `budget` of the context, but never what the tokenizer puts around a text.

        A chat template's text begins with the same token, so its beginning of sequence stays too.
        """
        if budget >= context:
            raise Refused(
                "too_long",
                f"max_new_tokens is {shown(budget)}, but prompt and generation together have a context of {context} "
                "tokens. Lower max_new_tokens",
            )
        side = self._recipe.truncate
        frame = self._frame
        head = _common(tokens, frame)
        tail = _common(tokens[head:][::-1], frame[head:][::-1])
        room = context - budget - head - tail
        if side is None or room < 1:
            remedy = (
                "Shorten it, lower max_new_tokens, or use --truncate left|right"
                if side is None
                else "Lower max_new_tokens"
            )
            raise Refused(
                "too_long",
                f"the prompt has {len(tokens)} tokens and may generate {budget}, together {len(tokens) + budget}; the "
                f"model's context is {context}. {remedy}",
            )
        end = len(tokens) - tail
        kept = tokens[end - room : end] if side == "left" else tokens[head : head + room]
        return [*tokens[:head], *kept, *tokens[end:]]

    @cached_property
    def _frame(self) -> Tokens:
        """What the tokenizer puts around a text: the tokens of an empty one."""
        return self._encoder.tokenize([""], special=True)[0]

    def _failed(self, row: Row, refused: Refused) -> Generation:
        error = RowError(refused.type, f"{_place(row)}: {refused.message}", row.line)
        columns, request = _columns_and_request(row, self._recipe.model is not None)
        return Generation(row.index, row_id(row), None, None, 0, 0, error, columns, request)


def _place(row: Row) -> str:
    return f"line {row.line} of {row.source}"


def _columns_and_request(row: Row, requests_only: bool) -> tuple[Mapping[str, object], Mapping[str, object] | None]:
    if isinstance(row.value, RowError):
        return {}, None
    if requests_only or openai.is_request(row.value):
        return {}, row.value
    return row.value, None


def _text(columns: Mapping[str, object], column: str | None) -> str:
    name = column or "prompt"
    text = columns.get(name)
    if isinstance(text, str):
        return text
    if text is not None:
        raise Refused("wrong_type", f'the "{name}" column must hold a text, not {shown(text)}')
    if name in columns:
        raise Refused("missing_prompt", f'the "{name}" column is null; give this row a text')
    listed = ", ".join(key if len(key) <= 60 and key.isprintable() else shown(key) for key in list(columns)[:20])
    raise Refused(
        "missing_prompt",
        f'there is no "{name}" column; its columns are {listed or "none"}. Use --prompt-column or --template',
    )


def _common(tokens: Tokens, frame: Tokens) -> int:
    """Length of the common beginning."""
    count = 0
    for token, other in zip(tokens, frame, strict=False):
        if token != other:
            break
        count += 1
    return count
