"""How a request says that its prompt is to be cut: vLLM's `truncate_prompt_tokens` and `truncation_side`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from batchgen.requests.refusal import Refused, quote

TRUNCATION = ("truncate_prompt_tokens", "truncation_side")
"""Keys of the body."""


class Truncation(NamedTuple):
    """How a prompt is cut."""

    tokens: int | None  # this many are kept; None: as many as the context leaves
    side: Literal["left", "right"]  # the side that is cut off


def read_truncation(body: Mapping[str, object]) -> Truncation | None:
    """How the body wants its prompt to be cut; None: it does not say.

    `left`, the default, keeps the last tokens, as with vLLM.

    Raises:
        Refused: a value is of the wrong type or out of range.
    """
    tokens, side = (body.get(name) for name in TRUNCATION)
    if side not in (None, "left", "right"):
        raise Refused("wrong_type", f'body.truncation_side must be "left" or "right", not {quote(side)}')
    if tokens is None:
        return None
    if isinstance(tokens, float) and tokens.is_integer():
        tokens = int(tokens)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not (tokens == -1 or tokens >= 1):
        rule = "a whole number, 1 or more, or -1 for as many as the context leaves"
        raise Refused("wrong_type", f"body.truncate_prompt_tokens must be {rule}, not {quote(tokens)}")
    return Truncation(None if tokens == -1 else tokens, "right" if side == "right" else "left")
