"""OpenAI's objects that answer a chat or a completion of a batch file. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from batchgen.requests import openai_logprobs
from batchgen.requests.openai_message import chat_message, read_message, reasoning_tokens
from batchgen.requests.refusal import Refused, quote
from batchgen.requests.token_texts import join
from batchgen.types import Details, Generation

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

_MOST_PROMPTS = 1024  # of one completion, as in vLLM


def read_prompts(prompt: object) -> Sequence[str | Sequence[int]]:
    """The prompts of a completion's body, at least one: texts, or lists of token ids.

    Raises:
        Refused: there is none, or it is something else.
    """
    if prompt is None:
        raise Refused("missing_prompt", "body.prompt is missing")
    are_several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], (str, list))
    prompts: list[object] = list(prompt) if isinstance(prompt, list) and are_several else [prompt]
    if len(prompts) > _MOST_PROMPTS:
        raise Refused("wrong_type", f"body.prompt holds {len(prompts)} prompts; {_MOST_PROMPTS} are the most of a line")
    kind = type(prompts[0])
    for place, each in enumerate(prompts):
        is_tokens = isinstance(each, list) and all(type(token) is int and token >= 0 for token in each)
        if type(each) is not kind or not (isinstance(each, str) or is_tokens):
            name = f"body.prompt[{place}]" if len(prompts) > 1 else "body.prompt"
            raise Refused("wrong_type", f"{name} must be a text or a list of token ids, not {quote(each)}")
    return cast("list[str | Sequence[int]]", prompts)


def completion(
    generation: Generation, digest: str, model: str, created: int, *, is_completion: bool, stop_reason: bool
) -> dict[str, object]:
    """OpenAI's object of a good generation for a chat or a completion.

    It has a choice for each sample; of several prompts, those of the first one come first.

    Args:
        digest: letters and digits that tell this answer from all others, for its id.
        created: Unix time in whole seconds.
        is_completion: the answer to a text, not to a chat.
        stop_reason: with vLLM's key of that name.
    """
    samples = [generation, *generation.others]
    body = body_of(generation)
    echoed = _echoes(samples, body) if is_completion else []
    choices = [
        {"index": place}
        | (
            _make_text_choice(sample, body, echoed[place])
            if is_completion
            else _make_chat_choice(sample, digest, stop_reason)
        )
        for place, sample in enumerate(samples)
    ]
    if stop_reason:
        for sample, choice in zip(samples, choices, strict=True):
            choice["stop_reason"] = None if sample.details is None else sample.details.stop_reason
    generated = sum(sample.generated_tokens for sample in samples)
    if hides_text(body):
        generated = 0
    name, kind = ("cmpl-", "text_completion") if is_completion else ("chatcmpl-", "chat.completion")
    usage: dict[str, object] = {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": generation.prompt_tokens + generated,
    }
    if (thought := reasoning_tokens(generation)) is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": thought}
    answer = {
        "id": name + digest,
        "object": kind,
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage,
    }
    return answer if is_completion else answer | _of_chats_prompt(generation)


def _make_chat_choice(sample: Generation, digest: str, is_vllm: bool) -> dict[str, object]:
    said = read_message(sample, digest)
    choice: dict[str, object] = {
        "message": chat_message(said, is_vllm=is_vllm),
        "logprobs": openai_logprobs.of_chat(sample),
        "finish_reason": said.finish_reason,
    }
    return choice | _token_ids(sample)


def _make_text_choice(sample: Generation, body: Mapping[str, object], echoed: str) -> dict[str, object]:
    echo, is_hidden = body.get("echo") is True, hides_text(body)
    text = "" if is_hidden else str(sample.text)
    choice: dict[str, object] = {
        "text": echoed + text,
        "logprobs": openai_logprobs.of_completion(sample, echo=echo, hides_text=is_hidden),
        "finish_reason": "length" if is_hidden else sample.finish_reason,
    }
    details = sample.details
    # An echo of log-probabilities has those of the prompt already, and one of token ids asks for their texts alone.
    if details is not None and details.prompt_logprobs is not None and (not echo or "prompt_logprobs" in body):
        choice["prompt_logprobs"] = openai_logprobs.of_prompt(details)
    if details is None or (echo and body.get("return_token_ids") is not True):
        return choice
    choice |= _token_ids(sample)
    if details.prompt_token_ids is not None:
        choice["prompt_token_ids"] = list(details.prompt_token_ids)
    return choice


def _token_ids(sample: Generation) -> dict[str, object]:
    if sample.details is None or sample.details.token_ids is None:
        return {}
    return {"token_ids": list(sample.details.token_ids)}


def _of_chats_prompt(generation: Generation) -> dict[str, object]:
    """What vLLM's answer to a chat says of its prompt, where the body asks."""
    details = generation.details
    if details is None:
        return {}
    answer: dict[str, object] = {}
    if details.prompt_logprobs is not None:
        answer["prompt_logprobs"] = openai_logprobs.of_prompt(details)
    if details.prompt_token_ids is not None:
        answer["prompt_token_ids"] = list(details.prompt_token_ids)
    return answer


def _echoes(samples: Sequence[Generation], body: Mapping[str, object]) -> list[str]:
    """The text that stands before that of each sample: its prompt, if the body says so."""
    if body.get("echo") is not True:
        return [""] * len(samples)
    prompts = read_prompts(body.get("prompt"))
    return [
        _text_of(prompts[place * len(prompts) // len(samples)], sample.details) for place, sample in enumerate(samples)
    ]


def _text_of(prompt: str | Sequence[int], details: Details | None) -> str:
    if isinstance(prompt, str):
        return prompt
    return join((details and details.prompt_token_texts) or ())


def body_of(generation: Generation) -> Mapping[str, object]:
    """The body of the request that is answered."""
    body = (generation.request or {}).get("body")
    return body if isinstance(body, Mapping) else {}


def hides_text(body: Mapping[str, object]) -> bool:
    """Whether a completion asks for its prompt alone: `echo`, and `max_tokens` 0."""
    limits = (body.get("max_completion_tokens"), body.get("max_tokens"))
    return body.get("echo") is True and any(type(limit) in (int, float) and limit == 0 for limit in limits)
