"""Log-probabilities in OpenAI's batch format: how a body asks for them, and what its answer shows. Pure.

Only the chosen tokens are answered for, none of their alternatives. A token is shown as the text that it has alone. One
that is only a part of a character has none, and is shown as U+FFFD, in `bytes` too: vLLM does the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from batchgen.requests.refusal import Refused, quote

_LEAST = -9999.0  # OpenAI's number for what can hardly be; JSON has no infinity


def read_logprobs_option(value: object, chat: bool) -> bool | None:
    """Reads `logprobs` of a body: whether it asks for log-probabilities; None: it says nothing.

    Args:
        chat: a chat's is true or false; a completion's is the number of alternatives to each token.

    Raises:
        Refused: it asks for alternatives, or is of another type.
    """
    if value is None:
        return None
    if value is False or (chat and value is True):
        return bool(value)
    if type(value) is int and value == 0:
        return not chat
    rule = "true or false" if chat else "0, which gives those of the generated tokens, without alternatives"
    raise Refused("unknown_parameter", f"body.logprobs is not supported: it must be {rule}, not {quote(value)}")


def of_chat(texts: Sequence[str], logprobs: Sequence[float]) -> dict[str, object]:
    """`logprobs` of a chat's choice."""
    return {
        "content": [
            {
                "token": text,
                "logprob": value,
                "bytes": list(text.encode("utf-8", "replace")),
                "top_logprobs": [],
            }
            for text, value in zip(texts, _bounded(logprobs), strict=True)
        ],
        "refusal": None,
    }


def of_completion(texts: Sequence[str], logprobs: Sequence[float]) -> dict[str, object]:
    """`logprobs` of a completion's choice. An offset counts the letters of the tokens before."""
    values = _bounded(logprobs)
    return {
        "text_offset": list(accumulate(map(len, texts[:-1]), initial=0)),
        "token_logprobs": values,
        "tokens": list(texts),
        "top_logprobs": [{text: value} for text, value in zip(texts, values, strict=True)],
    }


def _bounded(logprobs: Iterable[float]) -> list[float]:
    return [max(value, _LEAST) for value in logprobs]
