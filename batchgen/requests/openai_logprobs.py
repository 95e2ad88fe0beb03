"""Log-probabilities in OpenAI's batch format: how a body asks for them, and what its answer shows. Pure.

Only the chosen tokens are answered for, none of their alternatives. A token is shown as the text that it has alone. One
that is only a part of a character has none, and is shown as U+FFFD, in `bytes` too: vLLM does the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

_LEAST = -9999.0  # OpenAI's number for what can hardly be; JSON has no infinity


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
