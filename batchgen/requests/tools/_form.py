"""What every form of calls gives: the calls of functions, and the text that is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

Functions = Mapping[str, Mapping[str, object]]
"""The functions that a row offers, by name, each with the JSON schema of its parameters."""


class Call(NamedTuple):
    """A call of a function."""

    name: str
    arguments: str  # JSON text, as the model wrote it


class ParsedCalls(NamedTuple):
    """The calls in a text."""

    content: str  # what stands outside of them
    calls: Sequence[Call]


def join_content(pieces: Sequence[str]) -> str:
    """The text around calls: its pieces without white space at their ends, a blank line between two."""
    return "\n\n".join(stripped for piece in pieces if (stripped := piece.strip()))
