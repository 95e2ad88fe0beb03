"""The OpenAI batch format: a request line in, an answer line out. Pure; knows nothing of models.

Requests are for `/v1/chat/completions`, `/v1/completions` or `/v1/responses`, also as Azure writes them, without the
version. `openai_keys` says what becomes of the body's keys. Sampling differs from OpenAI's in one point: what the body
leaves out is the run's default or the model author's, so a request without `temperature` may be greedy, and one without
`max_tokens` ends at the run's `max_new_tokens`.

Answers come in two shapes, which differ where a request failed: OpenAI's own, and that of `vllm run-batch`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from batchgen.requests import openai_completions, openai_responses
from batchgen.requests.conversations import Conversation, read_conversation
from batchgen.requests.openai_completions import COMPLETIONS, read_prompts
from batchgen.requests.openai_keys import ENDPOINTS, check_keys
from batchgen.requests.openai_responses import RESPONSES
from batchgen.requests.openai_sampling import read_sampling
from batchgen.requests.refusal import Refused, quote
from batchgen.requests.row_ids import endpoint, own_id
from batchgen.requests.template import conversation
from batchgen.requests.truncation import read_truncation
from batchgen.types import MACHINE_ERRORS, Generation, RowError

Shape = Literal["openai", "vllm"]

_STREAMED = "Request must not be sent in stream mode"


@dataclass(frozen=True, slots=True)
class Request:
    """What a request line asks for: exactly one of `conversation`, `text` and `tokens` is set."""

    conversation: Conversation | None
    text: str | None
    tokens: Sequence[int] | None
    sampling: Mapping[str, object]  # values as they stand, by their names in `SamplingParams`
    spelled: Mapping[str, str]  # how the line spells those names, for sentences: max_new_tokens is body.max_tokens
    ignored: Sequence[str]  # keys of the body that are not known here
    further: Sequence[str | Sequence[int]] = ()  # prompts of a completion behind the first one, of the same type
    model: str = ""  # that it names; "": none


def parse(line: Mapping[str, object], models: Sequence[str] = ()) -> Request:
    """What a request line asks for.

    Args:
        models: the body must name one of these models or none; empty: it may name any.

    Raises:
        Refused: the line is not such a request, or asks for what batchgen cannot do. Types: wrong_type,
            missing_prompt, unknown_parameter, unsupported_url, stream, model_not_found.
    """
    custom_id, method, url, body = (line.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise Refused("wrong_type", f"custom_id must be a text that is not empty, not {quote(custom_id)}")
    missing = [name for name in ("method", "url", "body") if line.get(name) is None]
    if len(missing) > 1:
        listed = f"{', '.join(missing[:-1])} and {missing[-1]}"
        raise Refused("wrong_type", f"{listed} are missing: a line needs custom_id, method, url and body")
    if method != "POST":
        raise Refused("wrong_type", f'method must be "POST", not {quote(method)}')
    if not isinstance(url, str):
        raise Refused("wrong_type", f"url must be a text, not {quote(url)}")
    url, written = endpoint(url), url
    if url not in ENDPOINTS:
        raise Refused("unsupported_url", _unsupported(written))
    if not isinstance(body, Mapping):
        raise Refused("wrong_type", f"body must be an object, not {quote(body)}")
    if body.get("stream") not in (None, False):
        raise Refused("stream", _STREAMED)
    model = _read_model(body.get("model"), models)
    ignored = check_keys(body, url)
    sampling, spelled = read_sampling(body, url)
    read_truncation(body)
    if url != COMPLETIONS:
        read = openai_responses.conversation_of if url == RESPONSES else _messages
        said = read_conversation(body, read(body), "body.")
        return Request(said, None, None, sampling, spelled, ignored, model=model)
    first, *further = read_prompts(body.get("prompt"))
    text, tokens = (first, None) if isinstance(first, str) else (None, first)
    return Request(None, text, tokens, sampling, spelled, ignored, further, model)


def _messages(body: Mapping[str, object]) -> list[dict[str, object]]:
    return conversation(body.get("messages"), "body.messages", whole=False)


def _unsupported(url: str) -> str:
    # vLLM's sentence, so that a script which looks for it finds it.
    return f"URL {url} was used. Supported endpoints: {', '.join(ENDPOINTS)}."


def _read_model(named: object, models: Sequence[str]) -> str:
    """The name of the model that a body asks for; "" for none."""
    if named is not None and not isinstance(named, str):
        raise Refused("wrong_type", f"body.model must be a text, not {quote(named)}")
    if models and named is not None and named not in models:
        has = f"model is {quote(models[0])}: write that"
        if len(models) > 1:
            has = f"models are {', '.join(map(quote, models))}: write one of them"
        raise Refused(
            "model_not_found",
            f"body.model is {quote(named)}, but this run's {has} into the body, or give the name that the lines use "
            "with --served-model-name",
        )
    return named or ""


# HTTP's answer to each type of `RowError` that is not the request's fault, or not only a bad request.
_STATUS = {"model_not_found": 404, **dict.fromkeys(MACHINE_ERRORS, 500)}
_VLLM_TYPES = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError"}
_OPENAI_CODES = {"too_long": "context_length_exceeded"}


def answer(generation: Generation, model: str, created: int, shape: Shape) -> dict[str, object]:
    """The batch output line of a generation.

    Ids follow from the model, the custom id and the row number, so that a resumed run writes the same lines. A row
    that is no request line (malformed JSON) is called `line-<n>`, n counted from 1.

    Args:
        model: the name in the answer's body, unless the generation has an adapter, whose name it is then.
        created: Unix time in whole seconds.
        shape: how a failed request is answered. `openai`: an HTTP error with its body. `vllm`: no body, and the error
            beside the response, a plain text where the URL or stream mode was refused.
    """
    custom_id = _custom_id(generation)
    digest = hashlib.sha256(f"{model}\0{custom_id}\0{generation.index}".encode("utf-8", "surrogatepass")).hexdigest()
    status = 200
    body: object = None
    error: object = None
    if generation.error is None:
        body = _body(generation, digest[:32], generation.adapter or model, created, shape)
    else:
        status = _STATUS.get(generation.error.type, 400)
        failure = _failure(generation, generation.error, status, shape)
        body, error = (failure, None) if shape == "openai" else (None, failure)
    name, request_name = ("vllm-", "vllm-batch-") if shape == "vllm" else ("batch_req_", "req_")
    return {
        "id": f"{name}{digest[:32]}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"{request_name}{digest[32:]}", "body": body},
        "error": error,
    }


def _custom_id(generation: Generation) -> str:
    """What the line calls itself, however wrong the rest of it is: its answer is found by that. Else its number."""
    line = generation.columns if generation.request is None else generation.request
    if generation.error is None or own_id(line) is not None:
        return generation.id
    return f"line-{generation.error.line}"


def _body(generation: Generation, digest: str, model: str, created: int, shape: Shape) -> dict[str, object]:
    if _endpoint_of(generation) == RESPONSES:
        return openai_responses.response(generation, digest, model, created)
    is_completion = _endpoint_of(generation) == COMPLETIONS
    is_vllm = shape == "vllm"
    return openai_completions.completion(
        generation, digest, model, created, is_completion=is_completion, stop_reason=is_vllm
    )


def _endpoint_of(generation: Generation) -> str:
    return endpoint(str((generation.request or {}).get("url")))


def _failure(generation: Generation, error: RowError, status: int, shape: Shape) -> object:
    param = _parameter(error)
    if shape == "openai":
        kind = "server_error" if status == 500 else "invalid_request_error"
        code = _OPENAI_CODES.get(error.type, error.type)
        return {"error": {"message": error.message, "type": kind, "param": param, "code": code}}
    if error.type == "unsupported_url":
        return _unsupported(str((generation.request or {}).get("url")))
    if error.type == "stream":
        return _STREAMED
    return {"error": {"message": error.message, "type": _VLLM_TYPES[status], "param": param, "code": status}}


def _parameter(error: RowError) -> str | None:
    """The key of the body that a sentence of `parse` names, right after the place."""
    match = re.search(r": body\.(\w+)", error.message)
    return match[1] if match else None
