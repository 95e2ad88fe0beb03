"""OpenAI's objects that answer a chat or a completion of a batch file. Pure."""

from __future__ import annotations

from batchgen.requests import openai_logprobs
from batchgen.requests.openai_message import chat_message, read_message, reasoning_tokens
from batchgen.types import Generation

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def completion(
    generation: Generation, digest: str, model: str, created: int, *, is_completion: bool, stop_reason: bool
) -> dict[str, object]:
    """OpenAI's object of a good generation for a chat or a completion.

    Args:
        digest: letters and digits that tell this answer from all others, for its id.
        created: Unix time in whole seconds.
        is_completion: the answer to a text, not to a chat.
        stop_reason: with vLLM's key of that name.
    """
    choice: dict[str, object] = {"index": 0}
    if is_completion:
        name, kind, finish_reason = "cmpl-", "text_completion", generation.finish_reason
        choice["text"] = generation.text
    else:
        name, kind = "chatcmpl-", "chat.completion"
        said = read_message(generation, digest)
        choice["message"], finish_reason = chat_message(said, is_vllm=stop_reason), said.finish_reason
    shown_logprobs = None
    texts = None if generation.details is None else generation.details.token_texts
    if generation.logprobs is not None and texts is not None:
        show = openai_logprobs.of_completion if is_completion else openai_logprobs.of_chat
        shown_logprobs = show(texts, generation.logprobs)
    choice |= {"logprobs": shown_logprobs, "finish_reason": finish_reason}
    if stop_reason:
        choice["stop_reason"] = None
    usage: dict[str, object] = {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.generated_tokens,
        "total_tokens": generation.prompt_tokens + generation.generated_tokens,
    }
    thought = reasoning_tokens(generation)
    if thought is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": thought}
    return {
        "id": name + digest,
        "object": kind,
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": usage,
    }
