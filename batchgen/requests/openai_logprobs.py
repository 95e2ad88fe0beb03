"""Log-probabilities in the answers of OpenAI's batch format. Pure.

A token is shown as the text that it has alone, U+FFFD where that is a part of a character; `bytes` has its true bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from batchgen.requests.token_texts import find_offsets, to_bytes, to_text
from batchgen.types import Alternative, Details, Generation

_LEAST = -9999.0  # OpenAI's number for what can hardly be; JSON has no infinity


def of_chat(generation: Generation) -> dict[str, object] | None:
    """`logprobs` of a chat's choice; None: nobody has asked."""
    details = generation.details
    if generation.logprobs is None or details is None or details.token_texts is None:
        return None
    likeliest = details.top_logprobs or [()] * len(details.token_texts)
    rows = zip(details.token_texts, generation.logprobs, likeliest, strict=True)
    return {
        "content": [
            {
                **_token(text, value),
                "top_logprobs": [_token(each.text, each.logprob) for each in alternatives],
            }
            for text, value, alternatives in rows
        ],
        "refusal": None,
    }


def _token(text: str, logprob: float) -> dict[str, object]:
    return {"token": to_text(text), "logprob": max(logprob, _LEAST), "bytes": list(to_bytes(text))}


def of_completion(generation: Generation, *, echo: bool, hides_text: bool) -> dict[str, object] | None:
    """`logprobs` of a completion's choice; None: nobody has asked.

    Args:
        echo: the tokens of the prompt stand before those of the text. The first of them has no log-probability.
        hides_text: the generated tokens are left out.
    """
    details = generation.details
    if generation.logprobs is None or details is None or details.token_texts is None:
        return None
    texts: list[str] = []
    values: list[float | None] = []
    top: list[dict[str, float] | None] = []
    if echo:
        _add_prompt(details, texts, values, top)
    if not hides_text:
        likeliest = details.top_logprobs or [()] * len(details.token_texts)
        texts += details.token_texts
        values += [max(value, _LEAST) for value in generation.logprobs]
        top += [
            _by_text([(text, value), *((each.text, each.logprob) for each in alternatives)])
            for text, value, alternatives in zip(details.token_texts, generation.logprobs, likeliest, strict=True)
        ]
    return {
        "text_offset": find_offsets(texts),
        "token_logprobs": values,
        "tokens": [to_text(text) for text in texts],
        "top_logprobs": top,
    }


def _add_prompt(
    details: Details, texts: list[str], values: list[float | None], top: list[dict[str, float] | None]
) -> None:
    places = details.prompt_logprobs or []
    names = details.prompt_token_texts or [place[0].text if place else "" for place in places]
    texts += names[: len(places)]
    values += [max(place[0].logprob, _LEAST) if place else None for place in places]
    top += [_by_text((each.text, each.logprob) for each in place) if place else None for place in places]


def _by_text(tokens: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Log-probabilities by the text of the token. Different tokens can have one text: the likelier one counts."""
    values: dict[str, float] = {}
    for text, logprob in tokens:
        name = to_text(text)
        values[name] = max(logprob, _LEAST, values.get(name, _LEAST))
    return values


def of_prompt(details: Details) -> list[dict[str, object] | None] | None:
    """vLLM's `prompt_logprobs`: for each token of the prompt, that token and the likeliest ones, by their ids."""
    if details.prompt_logprobs is None:
        return None
    return [None if place is None else _by_id(place) for place in details.prompt_logprobs]


def _by_id(place: Sequence[Alternative]) -> dict[str, object]:
    return {
        str(each.token): {
            "logprob": max(each.logprob, _LEAST),
            "rank": each.rank,
            "decoded_token": to_text(each.text),
        }
        for each in place
    }
