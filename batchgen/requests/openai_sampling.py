"""The sampling parameters of a request's body, by their names in `SamplingParams`. Pure.

Log-probabilities are asked for in three ways: a chat says `logprobs` and `top_logprobs`, a completion says with
`logprobs` how many alternatives are to be shown, and a Response says it in `include`. A completion that echoes its
prompt and asks for log-probabilities gets those of the prompt too.
"""

from __future__ import annotations

from collections.abc import Mapping

from batchgen.requests import openai_responses
from batchgen.requests.openai_completions import COMPLETIONS, hides_text
from batchgen.requests.openai_constraints import read_body_constraint
from batchgen.requests.openai_keys import SAMPLING
from batchgen.requests.openai_responses import RESPONSES
from batchgen.requests.refusal import Refused, quote


def read_sampling(body: Mapping[str, object], url: str) -> tuple[dict[str, object], dict[str, str]]:
    """The values as they stand, and how the body spells their names, for sentences.

    Raises:
        Refused: a value is given twice, or what belongs together does not fit together.
    """
    sampling: dict[str, object] = {}
    spelled: dict[str, str] = {}
    for key, name in SAMPLING.items():
        value = body.get(key)
        if value is None:
            continue
        if name in sampling and sampling[name] != value:
            raise Refused(
                "wrong_type",
                f"body.{key} is {quote(value)} but {spelled[name]} is {quote(sampling[name])}; give one of them",
            )
        sampling[name] = value
        spelled[name] = f"body.{key}"
    if url == COMPLETIONS:
        _read_completion_logprobs(body, sampling, spelled)
        _read_echo(body, sampling)
    else:
        _read_chat_logprobs(body, url, sampling, spelled)
    if url == RESPONSES:
        sampling["n"] = 1  # its answer has no place for more, whatever the run is told
    return {**sampling, **read_body_constraint(body, is_response=url == RESPONSES)}, spelled


def _read_chat_logprobs(
    body: Mapping[str, object], url: str, sampling: dict[str, object], spelled: dict[str, str]
) -> None:
    wants, alternatives = body.get("logprobs"), body.get("top_logprobs")
    if wants is not None and not isinstance(wants, bool) and wants != 0:
        raise Refused(
            "wrong_type",
            f"body.logprobs must be true or false, not {quote(wants)}; top_logprobs says how many alternatives to show",
        )
    if wants is not None:
        sampling["logprobs"] = bool(wants)
    if url == RESPONSES and (openai_responses.includes_logprobs(body) or alternatives):
        sampling["logprobs"] = True
    if alternatives is not None:
        if alternatives != 0 and url != RESPONSES and wants is not True:
            raise Refused("wrong_type", "body.top_logprobs needs body.logprobs, which must be true")
        sampling["top_logprobs"], spelled["top_logprobs"] = alternatives, "body.top_logprobs"


def _read_completion_logprobs(body: Mapping[str, object], sampling: dict[str, object], spelled: dict[str, str]) -> None:
    value = body.get("logprobs")
    if value is None:
        return
    if value is False:
        sampling["logprobs"] = False
        return
    sampling |= {"logprobs": True, "top_logprobs": value}
    spelled["top_logprobs"] = "body.logprobs"
    if body.get("echo") is True and "prompt_logprobs" not in sampling:
        sampling["prompt_logprobs"], spelled["prompt_logprobs"] = value, "body.logprobs"


def _read_echo(body: Mapping[str, object], sampling: dict[str, object]) -> None:
    """An echo of token ids needs their texts; and nothing but a prompt can be echoed, with no token generated."""
    echo = body.get("echo")
    if not isinstance(echo, bool | None):
        raise Refused("wrong_type", f"body.echo must be true or false, not {quote(echo)}")
    if not echo:
        return
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], str):
        sampling["return_token_ids"] = True
    if hides_text(body):
        sampling["max_new_tokens"] = 1  # the answer leaves it out
