"""The keys of a request's body, and what becomes of each: carried out, harmless, or refused. Pure.

They are OpenAI's and vLLM's, and what people send by mistake for them. A key that would change the output in a way that
batchgen cannot follow is refused; a key about the service is accepted; one that nobody here knows is reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from batchgen.requests import conversations, openai_responses
from batchgen.requests.openai_completions import CHAT, COMPLETIONS
from batchgen.requests.openai_responses import RESPONSES
from batchgen.requests.refusal import Refused, quote
from batchgen.requests.template import without_null_keys
from batchgen.types import PARAMS

SAMPLING = {
    "max_completion_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",  # of a Response alone
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
    "stop": "stop",
}
"""The body's spellings of `SamplingParams`."""

# Keys that change the output, and the values (besides null) with which they do not. OpenAI's and vLLM's own.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("n", "best_of", "repetition_penalty", "length_penalty"), (1,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "top_logprobs", "min_p", "min_tokens"), (0,)),
    **dict.fromkeys(("echo", "ignore_eos", "use_beam_search", "early_stopping", "continue_final_message"), (False,)),
    **dict.fromkeys(("include_stop_str_in_output", "return_token_ids", "return_tokens_as_token_ids"), (False,)),
    **dict.fromkeys(("return_prompt_text", "return_token_offsets", "watermarking"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("tools", "functions", "documents", "stop_token_ids", "bad_words", "allowed_token_ids"), ([],)),
    **dict.fromkeys(("logits_processors", "logprob_token_ids"), ([],)),
    # "auto" chooses among the tools, and there are none.
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("logit_bias", "vllm_xargs", "repetition_detection", "extra_body"), ({},)),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    **dict.fromkeys(("suffix", "audio", "reasoning_effort", "verbosity", "web_search_options", "chat_template"), ()),
    **dict.fromkeys(("reasoning", "thinking", "thinking_token_budget", "enable_thinking", "moderation"), ()),
    **dict.fromkeys(("prompt_logprobs", "truncate_prompt_tokens", "truncation_side", "prompt_embeds"), ()),
    **dict.fromkeys(("structured_outputs", "structural_tag", "json_schema", "regex", "ebnf"), ()),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object"), ()),
    **dict.fromkeys(("guided_whitespace_pattern", "lora_path", "lora_request", "system"), ()),
    # What Transformers and other servers call it.
    **dict.fromkeys(("do_sample", "num_beams", "num_return_sequences", "max_length", "min_length"), ()),
    **dict.fromkeys(("max_new_tokens", "min_new_tokens", "max_output_tokens", "stop_sequences", "stop_strings"), ()),
    **dict.fromkeys(("top_a", "typical_p", "no_repeat_ngram_size", "bad_words_ids", "eos_token_id"), ()),
    **dict.fromkeys(("sampling_params", "generation_config", "parameters"), ()),
}
_NEUTRAL_AT: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    CHAT: {"add_special_tokens": (False,), "prompt": ()},
    COMPLETIONS: {"add_special_tokens": (True,), "messages": ()},
    RESPONSES: {"add_special_tokens": (False,), "messages": (), **openai_responses.NEUTRAL},
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
    "num_return_sequences": "write a line for each text, with a custom_id of its own",
    "n": "write a line for each text, with a custom_id of its own",
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
    CHAT: frozenset({"messages"}) | conversations.KEYS,
    COMPLETIONS: frozenset({"prompt"}),
    RESPONSES: frozenset({"max_output_tokens"}) | openai_responses.READ | openai_responses.HARMLESS,
}
ENDPOINTS = tuple(_READ_AT)
"""Where requests may go."""

_READ = frozenset({"model", "stream", "logprobs"})


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
        f"a plain row sets its parameters itself: {', '.join(sorted(PARAMS))}",
    ),
    **dict.fromkeys(
        ("image", "images", "image_url", "video", "videos", "multi_modal_data"), "only the text of a prompt is read"
    ),
    "prompt_token_ids": "a request to /v1/completions may bring token ids",
    "model": "the run has one model for all rows",
    "prefill": "put it into messages with continue_final_message, or behind the prompt",
    "system": "put it into messages",
    "system_prompt": "put it into messages",
}
SETTINGS = frozenset({*_NEUTRAL, *SAMPLING, *_PLAIN_ROWS_ALSO, "stream", "add_special_tokens"}) - PARAMS
"""Columns of a plain row that somebody may take for settings, and that are none."""


def is_neutral(key: str, value: object) -> bool:
    """Whether a setting with this value would change nothing."""
    return value is None or value in _NEUTRAL.get(key, ())


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
        if key in SAMPLING and key not in _NEUTRAL:
            continue
        neutral = _NEUTRAL_AT[endpoint].get(key, _NEUTRAL.get(key))
        if neutral is None:
            unknown.append(key)
        elif value not in neutral and without_null_keys(value) not in neutral:
            allowed = " or ".join([*(json.dumps(accepted) for accepted in neutral), "left out"])
            instead = f"; {_INSTEAD[key]}" if key in _INSTEAD else ""
            # A list or an object is shown by its type alone, and [] is a list, too.
            given = "" if isinstance(value, list | dict) else f", not {quote(value)}"
            raise Refused("unknown_parameter", f"body.{key} is not supported: it must be {allowed}{given}{instead}")
    return unknown
