"""Every key of a body that OpenAI or vLLM know is carried out, harmless or refused."""

from __future__ import annotations

from contextlib import suppress

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from batchgen.requests.openai_keys import CHAT, COMPLETIONS, check_keys
from batchgen.requests.refusal import Refused

# Of vLLM 0.9 to 0.32, beside OpenAI's.
_VLLM = """
add_generation_prompt add_special_tokens allowed_token_ids bad_words best_of cache_salt chat_template
continue_final_message documents early_stopping echo ec_transfer_params guided_choice guided_decoding_backend
guided_grammar guided_json guided_regex guided_whitespace_pattern ignore_eos include_reasoning
include_stop_str_in_output kv_transfer_params length_penalty logits_processors logprob_token_ids media_io_kwargs min_p
min_tokens mm_processor_kwargs priority prompt_embeds prompt_logprobs reasoning_effort repetition_detection
repetition_penalty request_id return_mm_kwargs return_prompt_text return_token_ids return_token_offsets
return_tokens_as_token_ids routed_experts_prompt_start session_id skip_special_tokens spaces_between_special_tokens
stop_token_ids stream_interval structural_tag structured_outputs suffix thinking_token_budget top_k
truncate_prompt_tokens truncation_side use_beam_search vllm_xargs watermarking
"""
OPENAI = {
    CHAT: chat_create_params.CompletionCreateParamsBase.__annotations__,
    COMPLETIONS: completion_create_params.CompletionCreateParamsBase.__annotations__,
}


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_no_key_of_openai_or_vllm_is_unknown(endpoint: str) -> None:
    for key in [*OPENAI[endpoint], *_VLLM.split()]:
        with suppress(Refused):
            assert check_keys({key: "a value"}, endpoint) == [], key
    assert check_keys({"mystery": 1}, endpoint) == ["mystery"]


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("extra_body", {"top_k": 5}, "put what is in it into the body itself"),
        ("functions", [{"name": "f"}], "body.tools has taken its place"),
        ("function_call", {"name": "f"}, "body.tool_choice has taken its place"),
        ("max_new_tokens", 5, "its name in a body is max_tokens"),
        ("stop_sequences", ["a"], "its name in a body is stop"),
        ("num_return_sequences", 3, "its name in a body is n"),
        ("grammar", "start: x", "give structured_outputs with a grammar"),
        ("thinking_tokens", 3, "its name in a body is thinking_token_budget"),
        ("prompt", "x", "a prompt goes to /v1/completions"),
    ],
)
def test_what_was_meant_well_is_refused_with_its_right_place(key: str, value: object, instead: str) -> None:
    with pytest.raises(Refused) as caught:
        check_keys({key: value}, CHAT)
    assert caught.value.message.endswith(instead) or f"; {instead}" in caught.value.message
