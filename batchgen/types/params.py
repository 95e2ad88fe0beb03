"""How a prompt is continued: the sampling parameters, with vLLM's names and definitions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_END = 2**31  # of what devices count with 32 bits

FIT = _END - 1
"""As many new tokens as the model's context leaves behind the prompt; no prompt that an engine sees has it."""

MOST_SAMPLES = 1024
"""Of one row."""

MOST_ALTERNATIVES = 20
"""Tokens that are shown beside each token of a text; as many as OpenAI and vLLM show."""

ConstraintKind = Literal["json_schema", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the whole generated text must be.

    With a model that thinks, it is the text behind the thinking.
    """

    kind: ConstraintKind
    text: str
    """The JSON schema, its keys in the order in which they were given; the regular expression; the choices, as a JSON
    list of texts; or the grammar, in Lark's or GBNF's notation."""


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued. Greedy unless `temperature` is above 0.

    Frozen but not slotted: the command line reads each default off the class.

    Raises:
        ValueError: a value is out of range; the message names the field and the rule.
    """

    max_new_tokens: int = 128  # FIT: as many as the context leaves
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    seed: int = 0
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    logprobs: bool = False  # give the log-probability of every generated token (`likelihood`)
    n: int = 1  # samples of the row
    min_p: float = 0.0  # tokens less likely than this share of the likeliest one are not drawn; 0: off
    repetition_penalty: float = 1.0  # for tokens of the prompt and of the text so far; 1: off
    presence_penalty: float = 0.0  # for tokens of the text so far
    frequency_penalty: float = 0.0  # the same, each time that they are in it
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids, each with what is added to its logit
    allowed_token_ids: tuple[int, ...] = ()  # no other token is generated; empty: all are allowed
    bad_words: tuple[str, ...] = ()  # texts whose tokens are not generated one after the other
    min_tokens: int = 0  # no end of sequence, no stop token and no stop text before this many tokens
    stop_token_ids: tuple[int, ...] = ()  # end the text, as an end of sequence does
    ignore_eos: bool = False  # an end of sequence does not end the text
    include_stop_str_in_output: bool = False  # the text ends behind the stop text
    skip_special_tokens: bool = True  # special tokens have no text in the output
    top_logprobs: int = 0  # the likeliest tokens that are shown beside each generated one; needs `logprobs`
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt; None: nothing of them
    return_token_ids: bool = False  # give the token ids of the prompt and of the text
    thinking_tokens: int | None = None  # the most that the model may think; None: as long as it likes
    constraint: Constraint | None = None  # what the text must be

    def __post_init__(self) -> None:
        _check(
            _is_int(self.max_new_tokens) and self.max_new_tokens >= 1,
            "max_new_tokens must be a whole number, 1 or more",
        )
        _check(self.max_new_tokens < _END, f"max_new_tokens must be below {_END}")
        _check(
            _is_number(self.temperature) and 0 <= self.temperature <= 100, "temperature must be a number from 0 to 100"
        )
        _check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p must be a number above 0 and at most 1")
        _check(_is_int(self.top_k) and self.top_k >= 0, "top_k must be a whole number, 0 (off) or more")
        _check(self.top_k < _END, f"top_k must be below {_END}")
        _check(_is_int(self.seed), "seed must be a whole number")
        _check(_are_texts(self.stop), "stop must be a text or a list of texts, none of them empty")
        for name in ("logprobs", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "return_token_ids"):
            _check(isinstance(getattr(self, name), bool), f"{name} must be true or false")
        self._check_penalties()
        self._check_tokens()
        self._check_counts()

    def _check_penalties(self) -> None:
        _check(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p must be a number from 0 (off) to 1")
        penalty = self.repetition_penalty
        # A logit of float32 stays finite.
        _check(_is_number(penalty) and 0.01 <= penalty <= 100, "repetition_penalty must be a number from 0.01 to 100")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(_is_number(value) and -2 <= value <= 2, f"{name} must be a number from -2 to 2")

    def _check_tokens(self) -> None:
        _check(_are_texts(self.bad_words), "bad_words must be a list of texts, none of them empty")
        for name in ("allowed_token_ids", "stop_token_ids"):
            ids = getattr(self, name)
            is_list = isinstance(ids, tuple) and all(_is_int(token) and 0 <= token < _END for token in ids)
            _check(is_list, f"{name} must be a list of token ids")
        is_bias = isinstance(self.logit_bias, tuple) and all(
            _is_int(token) and 0 <= token < _END and _is_number(bias) and -100 <= bias <= 100
            for token, bias in self.logit_bias
        )
        _check(is_bias, "logit_bias must be an object from token ids to numbers from -100 to 100")

    def _check_counts(self) -> None:
        _check(_is_int(self.n) and 1 <= self.n <= MOST_SAMPLES, f"n must be a whole number from 1 to {MOST_SAMPLES}")
        _check(_is_int(self.min_tokens) and self.min_tokens >= 0, "min_tokens must be a whole number, 0 or more")
        most = f"{self.max_new_tokens}, as many as may be generated"
        _check(self.min_tokens <= self.max_new_tokens, f"min_tokens must be at most {most}")
        _check(
            _is_int(self.top_logprobs) and 0 <= self.top_logprobs <= MOST_ALTERNATIVES,
            f"top_logprobs must be a whole number from 0 to {MOST_ALTERNATIVES}",
        )
        shown, thinking = self.prompt_logprobs, self.thinking_tokens
        _check(
            shown is None or (_is_int(shown) and 0 <= shown <= MOST_ALTERNATIVES),
            f"prompt_logprobs must be a whole number from 0 to {MOST_ALTERNATIVES}",
        )
        _check(
            thinking is None or (_is_int(thinking) and thinking >= 0),
            "thinking_tokens must be a whole number, 0 or more",
        )

    @property
    def edits_logits(self) -> bool:
        """Whether the model's logits are changed before a token is chosen, other than by temperature and truncation."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.allowed_token_ids
            or self.bad_words
            or self.min_tokens
        )

    def changed(self) -> Mapping[str, object]:
        """The values that are not the default."""
        return {name: value for name, default in _DEFAULTS.items() if (value := getattr(self, name)) != default}


_DEFAULTS = {param.name: param.default for param in dataclasses.fields(SamplingParams)}

PARAMS = frozenset(_DEFAULTS) - {"constraint"}
"""What a row may set for itself, by these names."""


def _check(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) and text for text in value)
