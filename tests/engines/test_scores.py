"""Scores of continuations, as lm-evaluation-harness asks for them: a line echoes context and continuation as ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from batchgen import Host, RunSettings, run
from batchgen.models.tokenizer import HfTokenizer
from batchgen.requests.openai_completions import COMPLETIONS
from tests.byte_tokenizer import request
from tests.commands.starts import ENVIRONMENT, read_rows, write_rows

CONTEXT = 7  # tokens of each prompt, before the continuation


@pytest.mark.parametrize("engine", ["accelerate", "paged"])
def test_scores_are_those_of_a_forward_over_context_and_continuation(
    engine: str, tiny_llama: Path, tmp_path: Path
) -> None:
    drawn = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, 260, (length,), generator=drawn).tolist() for length in (9, 12, 20)]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    best = greedy_continuation(model, prompts[0][:CONTEXT], 3)
    prompts.append([*prompts[0][:CONTEXT], *best])
    body = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234, "prompt": prompts}
    source = write_rows(tmp_path / "in.jsonl", [request(body, COMPLETIONS)])
    settings = RunSettings(model=str(tiny_llama), engine=engine, dtype="float32", selftest=False)
    out = run(str(source), tmp_path / "out", settings, host=Host(ENVIRONMENT)).folder
    [row] = read_rows(out / "generations.jsonl")
    choices = row["response"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    is_greedy = []
    tokenizer = HfTokenizer(str(tiny_llama))
    for tokens, choice in zip(prompts, choices, strict=True):
        expected = logprobs_of(model, tokens)
        found: dict[str, Any] = choice["logprobs"]
        assert found["token_logprobs"][0] is None
        assert found["token_logprobs"][CONTEXT:-1] == pytest.approx(expected[CONTEXT - 1 :], abs=1e-4)
        pairs = zip(found["token_logprobs"][CONTEXT:-1], found["top_logprobs"][CONTEXT:-1], strict=True)
        is_greedy.append(all(logprob == max(top.values()) for logprob, top in pairs))
        assert choice["text"] == tokenizer.decode(tokens) + tokenizer.decode(model_choice(model, tokens))
    assert is_greedy == [False, False, False, True]


def logprobs_of(model: Any, tokens: list[int]) -> list[float]:
    """Of each token but the first, by one forward."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    return [float(logits[place, token]) for place, token in enumerate(tokens[1:])]


def model_choice(model: Any, tokens: list[int]) -> list[int]:
    """The best next token."""
    with torch.no_grad():
        return [int(model(torch.tensor([tokens])).logits[0, -1].argmax())]


def greedy_continuation(model: Any, tokens: list[int], count: int) -> list[int]:
    found: list[int] = []
    for _ in range(count):
        found += model_choice(model, [*tokens, *found])
    return found
