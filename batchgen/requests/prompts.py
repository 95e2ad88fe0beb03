"""Rows to prompts: the chat template or `--template`, per-row parameters, tokens; or what is wrong with a row.

Pure but for one warning a key: everything it knows comes in as arguments. A row is, in this order, an OpenAI request
line, a text rendered by `--template`, the text in `--prompt-column`, a conversation in `messages`, or the text in
`prompt`. JSON null is "not given" wherever batchgen knows the keys, since in Parquet every row has every column. In
rows of Parquet and Arrow it is so at every depth of a conversation, its variables and a body.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence

from batchgen.engine import Tokenizer
from batchgen.requests import conversations, openai
from batchgen.requests.constraints import KINDS, read_constraint
from batchgen.requests.conversations import Conversation, Conversations, constrained, read_conversation
from batchgen.requests.openai_keys import SETTINGS, advice, is_neutral
from batchgen.requests.openai_responses import RESPONSES
from batchgen.requests.recipe import Recipe
from batchgen.requests.refusal import Refused, RowParams, check_encodable, quote
from batchgen.requests.row_ids import endpoint, is_request, make_id, may_be_request, read_id, row_id
from batchgen.requests.template import compile_template, conversation, without_nulls
from batchgen.requests.token_limits import TokenLimits
from batchgen.types import FIT, PARAMS, Generation, Markup, Prompt, Row, RowError, SamplingParams

_log = logging.getLogger(__name__)

_DEFAULT_LIMIT = SamplingParams().max_new_tokens
_READ_OF_ROWS = PARAMS.union(KINDS)
_RESULTS = ("logprobs", "top_logprobs", "prompt_logprobs")  # names of parameters, and of what they put out


class PromptReader:
    """Turns rows into prompts, and rows with which something is wrong into failed generations.

    Args:
        duplicates: numbers of rows whose id an earlier row has, and that row's place.
        among_requests: the input is an OpenAI batch file, so that a row with a `custom_id` alone is a line of it.
        warns: log what is ignored in rows; False: another reader of the same rows does.

    Raises:
        ValueError: the template is no Jinja template, or the model has no context to fit; a sentence.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer,
        duplicates: Mapping[int, str],
        among_requests: bool = False,
        warns: bool = True,
    ) -> None:
        if recipe.sampling.max_new_tokens == FIT and tokenizer.context is None:
            raise ValueError(
                "--max-new-tokens fit goes as far as the model's context, and this model states no limit of its "
                "context. Give a number"
            )
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._conversations = Conversations(recipe, tokenizer)
        self._duplicates = duplicates
        self._among_requests = among_requests
        self._warns = warns
        self._params = RowParams(recipe.sampling)
        self._limits = TokenLimits(tokenizer, recipe.truncate, recipe.authors_length)
        self._render = None if recipe.template is None else compile_template(recipe.template)
        used = re.findall(r"\w+", recipe.template or recipe.prompt_column or "")
        self._settings = SETTINGS.difference(used, ("adapter",) if recipe.adapters else ())
        # Words that columns of data have, too: what the template uses is one.
        self._constraint_columns = [kind for kind in KINDS if kind not in used]
        self._param_columns = PARAMS.difference({"n"}.intersection(used))
        self._reported: set[tuple[str, str | int]] = set()

    def read(self, rows: Sequence[Row]) -> list[Prompt | Generation]:
        """A window of rows, in their order. Calls the tokenizer at most twice, however many rows there are."""
        plain: list[Prompt] = []  # for the tokenizer to add its special tokens to
        templated: list[Prompt] = []  # a chat template's text has them
        outcomes = [self._draft(row, plain, templated) for row in rows]
        plain += [other for prompt in plain for other in prompt.others]
        for prompts, special in ((plain, True), (templated, False)):
            if prompts:
                tokens = self._tokenizer.tokenize([prompt.text for prompt in prompts], special=special)
                for prompt, ids in zip(prompts, tokens, strict=True):
                    prompt.tokens = ids
        return [
            self._limited(row, outcome) if isinstance(outcome, Prompt) else outcome
            for row, outcome in zip(rows, outcomes, strict=True)
        ]

    def _draft(self, row: Row, plain: list[Prompt], templated: list[Prompt]) -> Prompt | Generation:
        """The row's prompt, put into the list of those that need tokens, or its failure."""
        value = row.value
        if isinstance(value, RowError):
            return Generation(row.index, self._id(row), None, None, 0, 0, value, {})
        try:
            if row.index in self._duplicates:
                raise self._repeated(row, self._duplicates[row.index])
            prompt, from_chat = self._request(row, value) if self._is_request(value) else self._plain(row, value)
        except Refused as refused:
            return self._failed(row, refused)
        if from_chat is not None:
            (templated if from_chat else plain).append(prompt)
        return prompt

    def _is_request(self, value: Mapping[str, object]) -> bool:
        if self._recipe.model is not None or is_request(value):
            return True
        is_plain = self._render is not None or self._recipe.prompt_column is not None
        return self._among_requests and not is_plain and may_be_request(value)

    def _repeated(self, row: Row, first: str) -> Refused:
        sentence = f"the id {quote(self._id(row))} is that of {first}"
        if self._recipe.id_prefix is None and not first.endswith(f" of {row.source}"):
            sentence += ". With --id-prefix file, each id has the name of its file in front"
        return Refused("duplicate_id", sentence)

    def _id(self, row: Row) -> str:
        return row_id(row, self._recipe.id_prefix)

    def _plain(self, row: Row, value: Mapping[str, object]) -> tuple[Prompt, bool]:
        """The prompt, and whether its text is from a chat template."""
        own, adapter = read_id(value), self._find_adapter(value)
        said = self._plain_conversation(row, value)
        text, markup = (self._plain_text(value), None) if said is None else self._from_chat(row, said)
        from_chat = said is not None
        params = self._recipe.sampling
        if not self._settings.isdisjoint(value):
            self._report_settings(row, value, from_chat)
        if not _READ_OF_ROWS.isdisjoint(value):
            params = self._params.read(self._own_params(row, value), {})
        if said is not None:
            params = constrained(params, said, "")
        if not text.isascii():
            check_encodable(text)
        id = make_id(row, own, self._recipe.id_prefix)
        return Prompt(row.index, id, row.line, text, (), params, value, markup=markup, adapter=adapter), from_chat

    def _find_adapter(self, value: Mapping[str, object]) -> str:
        """The adapter that a plain row names; "": none."""
        named, names = value.get("adapter"), self._recipe.adapters
        if not names or named is None:
            return ""
        if not isinstance(named, str):
            raise Refused("wrong_type", f'the "adapter" column must hold a text, not {quote(named)}')
        if named not in names:
            raise Refused(
                "model_not_found",
                f'the "adapter" column is {quote(named)}, but this run\'s adapters are {", ".join(map(quote, names))}: '
                "write one of them, or null for the model without one",
            )
        return named

    def _own_params(self, row: Row, value: Mapping[str, object]) -> dict[str, object]:
        """The sampling parameters that a plain row sets itself, its constraint among them."""
        given = {name: value[name] for name in self._param_columns.intersection(value) if value[name] is not None}
        for name in _RESULTS:
            if isinstance(given.get(name), list):
                del given[name]  # what another run has put out, which is the input of this one
        kinds = [kind for kind in self._constraint_columns if value.get(kind) is not None]
        if len(kinds) > 1:
            raise Refused("wrong_type", f"{kinds[0]} and {kinds[1]} both say what the text must be; give one of them")
        for kind in kinds:
            given["constraint"] = read_constraint(kind, _given(row, value[kind]), kind)
        return given

    def _plain_text(self, value: Mapping[str, object]) -> str:
        """The text of a plain row that has no conversation."""
        return _text(value, self._recipe.prompt_column) if self._render is None else self._render(value)

    def _plain_conversation(self, row: Row, value: Mapping[str, object]) -> Conversation | None:
        """The conversation of a plain row; None: its prompt is a text."""
        column = self._recipe.prompt_column
        if self._render is not None:
            return None
        messages = value.get("messages")
        if column is None and messages is not None and value.get("prompt") is not None:
            raise Refused(
                "ambiguous_prompt",
                'the row has a "prompt" and "messages", and only one of them can be meant. Say which with '
                "--prompt-column prompt or --prompt-column messages",
            )
        if messages is None or not (column is None or (column == "messages" and not isinstance(messages, str))):
            return None
        given = {key: _given(row, value[key]) for key in conversations.KEYS if key in value}
        return read_conversation(given, conversation(_given(row, messages), "messages", whole=True), "")

    def _report_settings(self, row: Row, value: Mapping[str, object], from_chat: bool) -> None:
        for key in sorted(self._settings.intersection(value)):
            if not is_neutral(key, value[key]) and not (from_chat and key in conversations.KEYS):
                self._say_once(row, "the column %s is carried along and changes no text", key, advice(key))

    def _request(self, row: Row, value: Mapping[str, object]) -> tuple[Prompt, bool | None]:
        """The prompt, and whether its text is from a chat template; None if it brought its tokens along."""
        request = openai.parse({**value, "body": _given(row, value.get("body"))}, self._recipe.request_models)
        self._report(row, request.ignored)
        if (
            "max_new_tokens" not in request.sampling
            and (limit := self._recipe.sampling.max_new_tokens) == _DEFAULT_LIMIT
        ):
            remedy = ". --max-new-tokens fit lets it go as far as the model's context"
            key = "max_output_tokens" if endpoint(str(value.get("url"))) == RESPONSES else "max_tokens"
            self._say_once(row, f"the body sets no {key}: its answer ends after %s tokens", limit, remedy)
        if "temperature" not in request.sampling and not self._recipe.knows_temperature:
            self._say_once(
                row, "neither the body nor generation_config.json sets %s: its answer is greedy", "temperature"
            )
        params = self._params.read(request.sampling, request.spelled)
        text, markup = request.text or "", None
        if request.conversation is not None:
            text, markup = self._from_chat(row, request.conversation)
            params = constrained(params, request.conversation, "body.")
        check_encodable(text)
        tokens = request.tokens or ()
        prompt = Prompt(row.index, self._id(row), row.line, text, tokens, params, {}, value, markup=markup)
        prompt.adapter = request.model if request.model in self._recipe.adapters else ""
        prompt.others = [_make_other(prompt, further) for further in request.further]
        return prompt, None if request.tokens is not None else request.conversation is not None

    def _from_chat(self, row: Row, said: Conversation) -> tuple[str, Markup | None]:
        text, markup = self._conversations.render(said)
        if self._conversations.leaves_calls_in_text(said, markup):
            self._say_once(
                row, "the chat template shows no form of calls that is known, so that calls of %s stay in text", "tools"
            )
        return text, markup

    def _report(self, row: Row, ignored: Sequence[str]) -> None:
        for key in ignored:
            self._say_once(row, "the body's key %s is not known to batchgen and is ignored", key)

    def _say_once(self, row: Row, sentence: str, value: str | int, advice: str = "") -> None:
        if self._warns and (sentence, value) not in self._reported:
            self._reported.add((sentence, value))
            _log.warning(f"%s: {sentence}, here and in all other lines{advice}", _place(row), quote(value))

    def _limited(self, row: Row, prompt: Prompt) -> Prompt | Generation:
        """`prompt`, which has its tokens now, or why it cannot be generated from."""
        for place, each in enumerate((prompt, *prompt.others)):
            try:
                self._limits.apply(each)
            except Refused as refused:
                if prompt.others:
                    refused = Refused(refused.type, f"body.prompt[{place}]: {refused.message}")
                return self._failed(row, refused)
        return prompt

    def _failed(self, row: Row, refused: Refused) -> Generation:
        error = RowError(refused.type, f"{_place(row)}: {refused.message}", row.line)
        value = {} if isinstance(row.value, RowError) else row.value
        columns, request = ({}, value) if self._is_request(value) else (value, None)
        return Generation(row.index, self._id(row), None, None, 0, 0, error, columns, request)


def _make_other(prompt: Prompt, further: str | Sequence[int]) -> Prompt:
    """A further prompt of the same row."""
    if isinstance(further, str):
        check_encodable(further)
        return dataclasses.replace(prompt, text=further)
    return dataclasses.replace(prompt, tokens=further)


def _given(row: Row, value: object) -> object:
    return without_nulls(value) if row.has_every_key else value


def _place(row: Row) -> str:
    return f"line {row.line} of {row.source}"


def _text(columns: Mapping[str, object], column: str | None) -> str:
    name = column or "prompt"
    text = columns.get(name)
    if isinstance(text, str):
        return text
    if text is not None:
        raise Refused("wrong_type", f'the "{name}" column must hold a text, not {quote(text)}')
    if name in columns:
        what = "messages" if name == "messages" else "a text"
        raise Refused("missing_prompt", f'the "{name}" column is null; give this row {what}')
    if column is None and "messages" in columns:
        raise Refused("missing_prompt", 'the "messages" column is null; give this row messages')
    listed = ", ".join(key if len(key) <= 60 and key.isprintable() else quote(key) for key in list(columns)[:20])
    missing, remedy = f'"{name}" column', "Use --prompt-column or --template"
    if column is None:
        missing, remedy = 'column "prompt" or "messages"', f"Give it one of them, or use{remedy[3:]}"
    raise Refused("missing_prompt", f"there is no {missing}; its columns are {listed or 'none'}. {remedy}")
