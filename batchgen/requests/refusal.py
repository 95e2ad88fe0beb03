"""Refusing a row: the exception, and the checks that plain rows and OpenAI request lines share."""

from __future__ import annotations

import dataclasses
import json
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

    Raises:
        Refused: a value is of the wrong type or out of range.
    """
    values: dict[str, Any] = {name: _typed(name, value) for name, value in given.items()}
    try:
        return dataclasses.replace(default, **values)
    except ValueError as error:
        # The rule begins with the field's name.
        name, _, rule = str(error).partition(" ")
        message = f"{spelled.get(name, name)} {rule}"
        raise Refused("wrong_type", f"{message}, not {quote(given[name])}" if name in given else message) from None


def _typed(name: str, value: object) -> object:
    if name == "stop":
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    # A Parquet column of whole numbers with gaps is one of floats.
    if name in ("max_new_tokens", "top_k", "seed") and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


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
    """Of a prompt with letters that the tokenizer leaves out."""
    return Refused(
        "lost_letters",
        f"the model's tokenizer has no token for {quote(letters)} and leaves it out, so that the model would read "
        "another text. Change the prompt, or copy the model again if its tokenizer.json is damaged",
    )
