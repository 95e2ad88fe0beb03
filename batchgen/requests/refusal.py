"""Refusing a row: the exception, and the checks that plain rows and OpenAI request lines share."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from batchgen.types import SamplingParams


class Refused(Exception):
    """Why a row cannot become a prompt: the type and the sentence of its `RowError`, without the place."""

    def __init__(self, type: str, message: str) -> None:
        super().__init__(message)
        self.type = type
        self.message = message


def quote(value: object) -> str:
    """Quotes a JSON value for a sentence: short, whatever the value holds."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # Quoted as JSON, so that a newline or an escape sequence in the data stays on its line.
        return json.dumps(value if len(value) <= 60 else value[:57] + "...", ensure_ascii=False)
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of many digits"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    if isinstance(value, Mapping):
        return "an object" if value else "an empty object"
    return f"a value of type {type(value).__name__}"


def sampling_params(default: SamplingParams, given: Mapping[str, object], spelled: Mapping[str, str]) -> SamplingParams:
    """`default` with what the row sets itself; `spelled` is how it spells the names, where otherwise.

    `top_k` -1 is off, `seed` -1 not given and `thinking_tokens` -1 without a limit, as with vLLM. `top_logprobs` brings
    `logprobs` along.

    Raises:
        Refused: a value is of the wrong type or out of range.
    """
    values: dict[str, Any] = {name: _typed(name, value, spelled.get(name, name)) for name, value in given.items()}
    if values.get("seed") == -1:
        del values["seed"]
    if values.get("top_logprobs"):
        values.setdefault("logprobs", True)
    elif values.get("logprobs") is False:
        values["top_logprobs"] = 0
    try:
        return dataclasses.replace(default, **values)
    except ValueError as error:
        # The rule begins with the field's name.
        name, _, rule = str(error).partition(" ")
        given_value = f", not {_quote(name, given[name])}" if name in given else ""
        raise Refused("wrong_type", f"{spelled.get(name, name)} {rule}{given_value}") from None


class RowParams:
    """The sampling parameters of one row after the other.

    Most rows set one of a few combinations of values, and each combination is checked once.

    Args:
        default: what rows have that set nothing.
    """

    def __init__(self, default: SamplingParams) -> None:
        self._default = default
        self._checked: dict[object, SamplingParams] = {}

    def read(self, given: Mapping[str, object], spelled: Mapping[str, str]) -> SamplingParams:
        """`sampling_params` of one row."""
        kinds = tuple(map(type, given.values()))  # 1, 1.0 and True are equal, but not all of them are right
        if not _SCALARS.issuperset(kinds):
            return sampling_params(self._default, given, spelled)
        key = (tuple(given.items()), kinds)
        params = self._checked.get(key)
        if params is None:
            params = sampling_params(self._default, given, spelled)
            if len(self._checked) >= _MOST_CHECKED:
                self._checked.clear()
            self._checked[key] = params
        return params


_SCALARS = frozenset({bool, int, float, str})
_MOST_CHECKED = 4096  # a seed for each row makes as many combinations as there are rows
_LISTS = frozenset({"stop", "bad_words", "allowed_token_ids", "stop_token_ids"})
_MOST_QUOTED = 5  # items of a list in a sentence
_OFF = {"top_k": 0, "thinking_tokens": None}  # what -1 means
_WHOLE = frozenset(
    {
        *("max_new_tokens", "top_k", "seed", "n", "min_tokens", "top_logprobs", "prompt_logprobs", "thinking_tokens"),
    }
)


def _quote(name: str, value: object) -> str:
    """As `quote`, but where a list is right, a short one is shown whole: what is wrong is in it."""
    if name in _LISTS and isinstance(value, list) and 0 < len(value) <= _MOST_QUOTED:
        return f"[{', '.join(map(quote, value))}]"
    return quote(value)


def _typed(name: str, value: object, spelled: str) -> object:
    if name == "stop" and isinstance(value, str):
        return (value,)
    if name == "logit_bias" and isinstance(value, Mapping):
        return tuple(_bias(token, bias, spelled) for token, bias in value.items() if bias is not None)
    if name in ("stop", "bad_words") and isinstance(value, list):
        return tuple(value)
    if name == "allowed_token_ids" and value == []:
        raise Refused("wrong_type", f"{spelled} must have a token id in it, or be left out: no token would be allowed")
    if name in ("allowed_token_ids", "stop_token_ids") and isinstance(value, list):
        return tuple(map(_whole, value))
    if name in _WHOLE:
        whole = _whole(value)
        return _OFF[name] if name in _OFF and whole == -1 else whole
    return value


def _whole(value: object) -> object:
    """A whole number as one: a Parquet column of whole numbers with gaps is one of floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _bias(token: object, bias: object, spelled: str) -> tuple[int, float]:
    # JSON has only texts for keys.
    if not isinstance(token, str) or not re.fullmatch(r"[0-9]{1,10}", token):
        raise Refused("wrong_type", f"{spelled}: the key {quote(token)} is no token id")
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
        raise Refused("wrong_type", f"{spelled}: the bias of token {token} must be from -100 to 100, not {quote(bias)}")
    return int(token), bias


def check_encodable(text: str) -> None:
    """Python's strings can hold what UTF-8 cannot, and tokenizers then fail for the whole window.

    Raises:
        Refused: this one does.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused("wrong_type", "the prompt holds half of a surrogate pair, which is no text") from None


def refuse_lost(letters: str) -> Refused:
    """The refusal of a prompt with letters that the tokenizer leaves out."""
    return Refused(
        "lost_letters",
        f"the model's tokenizer has no token for {quote(letters)} and leaves it out, so that the model would read "
        "another text. Change the prompt, or copy the model again if its tokenizer.json is damaged",
    )
