"""The keys of a request's body, and what becomes of each: carried out, harmless, or refused. Pure.

They are OpenAI's and vLLM's, and what people send by mistake for them. A key that would change the output in a way that
batchgen cannot follow is refused; a key about the service is accepted; one that nobody here knows is reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from batchgen.requests import conversations, openai_constraints, openai_responses
from batchgen.requests.constraints import KINDS
from batchgen.requests.openai_completions import CHAT, COMPLETIONS
from batchgen.requests.openai_responses import RESPONSES
from batchgen.requests.refusal import Refused, quote
from batchgen.requests.template import without_null_keys
from batchgen.requests.truncation import TRUNCATION
from batchgen.types import PARAMS

_SAME_NAME = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "min_tokens", "ignore_eos", "bad_words"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "allowed_token_ids"),
    *("stop_token_ids", "include_stop_str_in_output", "skip_special_tokens", "prompt_logprobs", "return_token_ids"),
)
SAMPLING = {
    "max_completion_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",  # of a Response alone
    "thinking_token_budget": "thinking_tokens",
    **{name: name for name in _SAME_NAME},
}
"""The body's spellings of `SamplingParams`, beside those of log-probabilities and of constraints."""

# Keys that change the output, and the values (besides null) with which they do not. OpenAI's and vLLM's own.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("best_of", "length_penalty"), (1,)),
    **dict.fromkeys(("use_beam_search", "early_stopping", "continue_final_message"), (False,)),
    **dict.fromkeys(("return_tokens_as_token_ids", "echo"), (False,)),
    **dict.fromkeys(("return_prompt_text", "return_token_offsets", "watermarking"), (False,)),
    **dict.fromkeys(("spaces_between_special_tokens", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("tools", "functions", "documents", "logits_processors", "logprob_token_ids"), ([],)),
    # "auto" chooses among the tools, and there are none.
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("vllm_xargs", "repetition_detection", "extra_body"), ({},)),
    "modalities": (["text"],),
    **dict.fromkeys(("suffix", "audio", "reasoning_effort", "verbosity", "web_search_options", "chat_template"), ()),
    **dict.fromkeys(("reasoning", "thinking", "enable_thinking", "moderation", "prompt_embeds"), ()),
    **dict.fromkeys(("structural_tag", "guided_json_object", "lora_path", "lora_request", "system"), ()),
    # What Transformers and other servers call it.
    **dict.fromkeys(("do_sample", "num_beams", "num_return_sequences", "max_length", "min_length"), ()),
    **dict.fromkeys(("max_new_tokens", "min_new_tokens", "max_output_tokens", "stop_sequences", "stop_strings"), ()),
    **dict.fromkeys(("top_a", "typical_p", "no_repeat_ngram_size", "bad_words_ids", "eos_token_id"), ()),
    **dict.fromkeys(("sampling_params", "generation_config", "parameters", "thinking_tokens", "choice", "grammar"), ()),
}
_NEUTRAL_AT: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    CHAT: {"add_special_tokens": (False,), "prompt": ()},
    COMPLETIONS: {"add_special_tokens": (True,), "messages": (), "top_logprobs": (0,)},
    RESPONSES: {"add_special_tokens": (False,), "messages": (), "n": (1,), **openai_responses.NEUTRAL},
}

# What to do instead, for keys that somebody meant well.
_INSTEAD = {
    "extra_body": "put what is in it into the body itself, as the openai package does",
    "enable_thinking": "put it into body.chat_template_kwargs",
    "functions": "body.tools has taken its place",
    "function_call": "body.tool_choice has taken its place",
    "max_new_tokens": "its name in a body is max_tokens",
    "max_output_tokens": "its name in a body is max_tokens",
    "max_length": "give max_tokens",
    "stop_sequences": "its name in a body is stop",
    "stop_strings": "its name in a body is stop",
    "num_return_sequences": "its name in a body is n",
    "min_new_tokens": "its name in a body is min_tokens",
    "min_length": "its name in a body is min_tokens",
    "thinking_tokens": "its name in a body is thinking_token_budget",
    "eos_token_id": "give stop_token_ids",
    "bad_words_ids": "give bad_words",
    "guided_json_object": 'give response_format with the type "json_object"',
    "structural_tag": "give response_format or structured_outputs",
    "choice": "give structured_outputs with a choice",
    "grammar": "give structured_outputs with a grammar",
    "best_of": "or as large as n: give n, and choose among the choices",
    "sampling_params": "put what is in it into the body itself",
    "generation_config": "put what is in it into the body itself",
    "parameters": "put what is in it into the body itself",
    "system": "make it the first of body.messages",
    "prompt": "a prompt goes to /v1/completions",
    "messages": "messages go to /v1/chat/completions",
}

# Keys about the service rather than the text, or about images and the like, which are refused where they stand.
_HARMLESS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "stream_options", "safety_identifier", "parallel_tool_calls"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "prediction", "include_reasoning"),
        *("cache_salt", "priority", "request_id", "session_id", "stream_interval", "timeout", "extra_headers"),
        *("extra_query", "kv_transfer_params", "ec_transfer_params", "routed_experts_prompt_start"),
        *("return_mm_kwargs", "mm_processor_kwargs", "media_io_kwargs", "guided_decoding_backend"),
    }
)
_READ_AT = {
    CHAT: frozenset({"messages", "top_logprobs"}) | conversations.KEYS,
    COMPLETIONS: frozenset({"prompt", "echo"}),
    RESPONSES: frozenset({"max_output_tokens", "top_logprobs"}) | openai_responses.READ | openai_responses.HARMLESS,
}
ENDPOINTS = tuple(_READ_AT)
"""Where requests may go."""

_READ = frozenset({"model", "stream", "logprobs", *TRUNCATION, *openai_constraints.KEYS})


def _spelled(name: str) -> list[str]:
    """Other spellings of a name of words with underscores, as other tools have them."""
    first, *others = name.split("_")
    return ["-".join([first, *others]), first + "".join(map(str.title, others)), name.upper()] if others else []


# What people take for a setting in a plain row, beside the keys of a body, and what to do instead.
_PLAIN_ROWS_ALSO = {
    **dict.fromkeys(conversations.KEYS, "the row has no messages"),
    **dict.fromkeys(
        ("max_tokens", "max_completion_tokens", "maxTokens", "maxOutputTokens", "max_output_tokens"),
        "max_new_tokens is what a plain row may set",
    ),
    **{other: f"its name is {name}" for name in PARAMS for other in _spelled(name)},
    **dict.fromkeys(
        ("sampling_params", "generation_config", "generationConfig", "parameters", "extra_body", "params"),
        "a plain row has a column for each of its parameters, like max_new_tokens and temperature",
    ),
    **dict.fromkeys(
        ("image", "images", "image_url", "video", "videos", "multi_modal_data"), "only the text of a prompt is read"
    ),
    **dict.fromkeys(
        ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        "a plain row gives json_schema, regex, choice or grammar",
    ),
    **dict.fromkeys(("num_return_sequences", "best_of"), "n is what a plain row may set"),
    "min_new_tokens": "its name is min_tokens",
    "thinking_token_budget": "its name is thinking_tokens",
    "echo": "the row has its prompt",
    **dict.fromkeys(TRUNCATION, "--truncate cuts prompts that are too long"),
    "prompt_token_ids": "a request to /v1/completions may bring token ids",
    "model": "the run has one model for all rows",
    "adapter": "--adapter NAME=FOLDER gives the run an adapter that rows may name",
    "prefill": "put it into messages with continue_final_message, or behind the prompt",
    "system": "put it into messages",
    "system_prompt": "put it into messages",
}
SETTINGS = frozenset(
    {
        *(*_NEUTRAL, *SAMPLING, *_PLAIN_ROWS_ALSO, *openai_constraints.KEYS),
        *("stream", "add_special_tokens", *TRUNCATION),
    }
).difference(PARAMS, KINDS)
"""Columns of a plain row that somebody may take for settings, and that are none."""


def is_neutral(key: str, value: object) -> bool:
    """Whether a setting with this value would change nothing."""
    return value is None or value in _NEUTRAL.get(key, ({"type": "text"},) if key == "response_format" else ())


def advice(key: str) -> str:
    """What to do in the place of this column of a plain row, behind a colon; or nothing."""
    return f": {_PLAIN_ROWS_ALSO[key]}" if key in _PLAIN_ROWS_ALSO else ""


def check_keys(body: Mapping[str, object], endpoint: str) -> list[str]:
    """The keys that are not known here.

    Raises:
        Refused: a key changes the output.
    """
    unknown = []
    for key, value in body.items():
        if value is None or key in _READ or key in _READ_AT[endpoint] or key in _HARMLESS:
            continue
        neutral = _NEUTRAL_AT[endpoint].get(key, _NEUTRAL.get(key))
        if neutral is None:
            if key not in SAMPLING:
                unknown.append(key)
        elif key == "best_of" and value == body.get("n"):  # the best of as many as are given
            continue
        elif value not in neutral and without_null_keys(value) not in neutral:
            allowed = " or ".join([*(json.dumps(accepted) for accepted in neutral), "left out"])
            instead = f"; {_INSTEAD[key]}" if key in _INSTEAD else ""
            # A list or an object is shown by its type alone, and [] is a list, too.
            given = "" if isinstance(value, list | dict) else f", not {quote(value)}"
            raise Refused("unknown_parameter", f"body.{key} is not supported: it must be {allowed}{given}{instead}")
    return unknown
