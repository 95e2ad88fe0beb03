"""Texts of single tokens. A token can be a part of a character: such bytes are lone surrogates in its text. Pure.

That is Python's error handler "surrogateescape"; an engine makes these texts (`HfTokenizer.token_text`), and answers
show U+FFFD in their place and the bytes beside it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence


def to_bytes(text: str) -> bytes:
    """The bytes of a token."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return text.encode("utf-8", "replace")


def to_text(text: str) -> str:
    """The text of a token as it is shown: U+FFFD for what is no character."""
    return text if text.isascii() else to_bytes(text).decode("utf-8", "replace")


def join(texts: Iterable[str]) -> str:
    """The text of several tokens, in which parts of characters are whole."""
    return b"".join(map(to_bytes, texts)).decode("utf-8", "replace")


def find_offsets(texts: Sequence[str]) -> list[int]:
    """The letters that are complete before each token."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets = []
    letters = 0
    for text in texts:
        offsets.append(letters)
        letters += len(decoder.decode(to_bytes(text)))
    return offsets
