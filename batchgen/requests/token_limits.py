"""What a model can take of a prompt: tokens that its embedding has, within its context. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Literal

from batchgen.engine import Tokenizer
from batchgen.requests.refusal import Refused, quote, refuse_lost
from batchgen.requests.truncation import read_truncation
from batchgen.types import FIT, Prompt, SamplingParams, Tokens


class TokenLimits:
    """The limits of one model.

    Args:
        truncate: the side cut off a prompt that is too long; None: it is refused.
        shortens: a `max_new_tokens` that means no more than the context leaves; None: there is none.
    """

    def __init__(
        self, tokenizer: Tokenizer, truncate: Literal["left", "right"] | None, shortens: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._truncate = truncate
        self._shortens = shortens

    def apply(self, prompt: Prompt) -> None:
        """Cuts what is too long, and resolves `max_new_tokens` where it is `FIT`.

        Raises:
            Refused: the model cannot take this prompt. Types: empty_prompt, lost_letters, too_long,
                unknown_token, wrong_type.
        """
        if not prompt.tokens:
            raise Refused("empty_prompt", "the prompt is empty: it has no tokens")
        if lost := self._tokenizer.find_lost(prompt.text):
            raise refuse_lost(lost)
        context = self._tokenizer.context
        self._cut_as_wanted(prompt)
        if prompt.params.max_new_tokens == FIT:
            prompt.params = _limited(prompt.params, self._room(prompt.tokens))
        elif context is not None and len(prompt.tokens) + prompt.params.max_new_tokens > context:
            self._make_fit(prompt, context)
        self._check_vocabulary(prompt)

    def _cut_as_wanted(self, prompt: Prompt) -> None:
        """Cuts the prompt of a request as its body says."""
        body = None if prompt.request is None else prompt.request.get("body")
        wanted = read_truncation(body) if isinstance(body, Mapping) else None
        if wanted is None:
            return
        kept = wanted.tokens
        if kept is None:
            context, budget = self._tokenizer.context, prompt.params.max_new_tokens
            if context is None:
                return
            kept = context - (1 if budget in (FIT, self._shortens) else budget)
        if kept >= len(prompt.tokens):
            return
        shortened = self._cut(prompt.tokens, kept, wanted.side)
        if shortened is None:
            raise Refused(
                "too_long",
                f"body.truncate_prompt_tokens leaves no token of the prompt: {max(kept, 0)} may stay, and the model's "
                "own marks around it take them. Raise it, or lower max_tokens",
            )
        prompt.tokens = shortened

    def _make_fit(self, prompt: Prompt, context: int) -> None:
        if prompt.params.max_new_tokens == self._shortens and len(prompt.tokens) < context:
            prompt.params = _limited(prompt.params, context - len(prompt.tokens))
        else:
            prompt.tokens = self._shortened(prompt.tokens, prompt.params.max_new_tokens, context)

    def _check_vocabulary(self, prompt: Prompt) -> None:
        size = self._tokenizer.vocabulary
        if size is None:
            return
        self._check_params(prompt, size)
        if (largest := max(prompt.tokens)) < size:
            return
        if not prompt.text:  # the row brought the ids themselves
            raise Refused("wrong_type", f"body.prompt has token {quote(largest)}, but the model has {size} tokens")
        name = self._tokenizer.token_name(largest)
        called = "" if name is None else f" ({quote(name)})"
        raise Refused("unknown_token", f"the prompt has token {largest}{called}, but the model has {size} tokens")

    def _check_params(self, prompt: Prompt, size: int) -> None:
        """Refuses token ids in the sampling parameters that the model does not have."""
        params = prompt.params
        if not (params.logit_bias or params.allowed_token_ids or params.stop_token_ids):
            return
        ids = {
            "logit_bias": [token for token, _ in params.logit_bias],
            "allowed_token_ids": params.allowed_token_ids,
            "stop_token_ids": params.stop_token_ids,
        }
        for name, tokens in ids.items():
            if tokens and max(tokens) >= size:
                spelled = name if prompt.request is None else f"body.{name}"
                raise Refused("wrong_type", f"{spelled} has token {max(tokens)}, but the model has {size} tokens")

    def _room(self, tokens: Tokens) -> int:
        """How many tokens the context leaves behind `tokens`."""
        context = self._tokenizer.context
        if context is None:
            raise Refused("too_long", "the model has no limit of its context. Give max_new_tokens as a number")
        if len(tokens) >= context:
            raise Refused(
                "too_long",
                f"the prompt has {len(tokens)} tokens; the model's context is {context}, which leaves no room for "
                "new ones. Shorten it",
            )
        return context - len(tokens)

    def _shortened(self, tokens: Tokens, budget: int, context: int) -> Tokens:
        """`tokens` cut to leave `budget` of the context, but never what the tokenizer puts around a text.

        A chat template's text begins with the same token, so its beginning of sequence stays too.
        """
        if budget >= context:
            raise Refused(
                "too_long",
                f"max_new_tokens is {quote(budget)}, but prompt and generation together have a context of {context} "
                "tokens. Lower max_new_tokens",
            )
        shortened = None if self._truncate is None else self._cut(tokens, context - budget, self._truncate)
        if shortened is None:
            remedy = (
                "Shorten it, lower max_new_tokens, or use --truncate left|right"
                if self._truncate is None
                else "Lower max_new_tokens"
            )
            raise Refused(
                "too_long",
                f"the prompt has {len(tokens)} tokens and may generate {budget}, together {len(tokens) + budget}; the "
                f"model's context is {context}. {remedy}",
            )
        return shortened

    def _cut(self, tokens: Tokens, count: int, side: Literal["left", "right"]) -> Tokens | None:
        """`tokens` cut to `count` on a side, with what the tokenizer puts around a text; None: no room for more."""
        frame = self._frame
        head = _common(tokens, frame)
        tail = _common(tokens[head:][::-1], frame[head:][::-1])
        room = count - head - tail
        if room < 1:
            return None
        end = len(tokens) - tail
        kept = tokens[end - room : end] if side == "left" else tokens[head : head + room]
        return [*tokens[:head], *kept, *tokens[end:]]

    @cached_property
    def _frame(self) -> Tokens:
        """What the tokenizer puts around a text: the tokens of an empty one."""
        return self._tokenizer.tokenize([""], special=True)[0]


def _limited(params: SamplingParams, max_new_tokens: int) -> SamplingParams:
    """`params` with no more new tokens than the context leaves."""
    if params.min_tokens > max_new_tokens:
        raise Refused(
            "too_long",
            f"min_tokens is {params.min_tokens}, but the context leaves room for {max_new_tokens} new tokens behind "
            "the prompt. Shorten it, or lower min_tokens",
        )
    return dataclasses.replace(params, max_new_tokens=max_new_tokens)


def _common(tokens: Tokens, frame: Tokens) -> int:
    """Length of the common beginning."""
    count = 0
    for token, other in zip(tokens, frame, strict=False):
        if token != other:
            break
        count += 1
    return count
