"""No row, whatever it holds, ends a run."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from batchgen.requests.openai import answer
from batchgen.requests.prompts import PromptReader
from batchgen.requests.recipe import Recipe
from batchgen.requests.row_ids import row_id
from batchgen.types import Generation, Prompt, SamplingParams
from tests.byte_tokenizer import ByteTokenizer, request, rows

# What a row may be: anything JSON can say, under the names that mean something here as often as under others.
_MEANT = (
    *("id", "custom_id", "prompt", "messages", "role", "content", "type", "text", "chat_template_kwargs", "tokenize"),
    *("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop", "method", "url", "body", "model", "stream"),
    *("max_tokens", "max_completion_tokens", "n", "logit_bias", "tools", "response_format", "logprobs"),
)
NAMES = st.text(max_size=3) | st.sampled_from(_MEANT)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["\ud800", "POST"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
HELLO = [{"role": "user", "content": "Hello"}]
ROWS = st.dictionaries(NAMES, JSON)
GOOD_ROWS = ROWS.map(lambda columns: {"prompt": "p", **columns})
BODIES = ROWS | ROWS.map(lambda body: {**body, "prompt": "p", "messages": HELLO})
REQUESTS = st.fixed_dictionaries(
    {"custom_id": st.just("r") | JSON, "method": st.just("POST") | JSON, "body": BODIES},
    optional={"url": st.sampled_from(["/v1/chat/completions", "/v1/completions"]) | JSON},
)
SHORT = SamplingParams(max_new_tokens=8)
RECIPES = st.sampled_from(
    [
        Recipe(sampling=SHORT),
        Recipe(sampling=SHORT, model="m"),
        Recipe(sampling=SHORT, prompt_column="text"),
        Recipe(sampling=SHORT, truncate="left"),
        Recipe(
            template="{{ prompt }}{{ content * seed }}{% for role in messages %}{{ role.text }}{% endfor %}",
            sampling=SHORT,
        ),
    ]
)


@given(st.lists(ROWS | GOOD_ROWS | REQUESTS, max_size=4), RECIPES, st.booleans())
def test_no_row_raises_and_each_has_one_result(values: list[Mapping[str, object]], recipe: Recipe, bos: bool) -> None:
    window = rows(*values)
    tokenizer = ByteTokenizer(context=20, bos=bos)
    results = PromptReader(recipe, tokenizer, {}).read(window)
    assert [result.index for result in results] == list(range(len(values)))
    assert [result.id for result in results] == [row_id(row) for row in window]
    for row, result in zip(window, results, strict=True):
        if isinstance(result, Prompt):
            assert 0 < len(result.tokens) <= 20 - result.params.max_new_tokens
        else:
            assert result.error is not None
            assert result.error.message.startswith(f"line {row.line} of prompts.jsonl: ")
            assert result.error.line == row.line
            assert answer(result, "m", 0, "openai")["error"] is None
            assert answer(result, "m", 0, "vllm")["error"] is not None


def test_deeply_nested_values_do_not_raise() -> None:
    deep: object = "x"
    for _ in range(100_000):
        deep = [deep]
    plain: dict[str, object] = {"custom_id": "x", "url": "u", "prompt": "p"}
    values: list[dict[str, object]] = [
        *({**plain, name: deep} for name in ("id", "prompt", "messages", "stop", "body")),
        *(request({"messages": HELLO, name: deep}) for name in ("messages", "response_format", "stop", "tools", "n")),
    ]
    results = PromptReader(Recipe(), ByteTokenizer(), {}).read(rows(*values))
    assert all(isinstance(result, Generation) for result in results)
