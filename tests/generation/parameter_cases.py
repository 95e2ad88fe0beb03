"""What each parameter of a row must do to its tokens: cases, and a reference that decodes one row with plain code.

The reference has one forward a token, without a cache, and changes the logits by Transformers' own processors where
there are some; else by what the definition says. Cases are for rows in float32, in any engine.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batchgen.types import Prompt, SamplingParams
from tests.tiny_models import END, Model, random_prompts

LETTERS = range(4, 260)  # of the tiny models' vocabulary: bytes, in the order of their byte-level characters

CASES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "repetition below 1": {"repetition_penalty": 0.8},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.5},
    "negative penalties": {"frequency_penalty": -0.5, "presence_penalty": -1.0},
    "bias": {"logit_bias": ((40, 6.0), (41, 5.5), (42, -100.0), (END, -2.5))},
    "allowed": {"allowed_token_ids": (END, *range(60, 90))},
    "allowed and biased": {"allowed_token_ids": tuple(range(30, 60)), "logit_bias": ((31, 3.0), (200, 50.0))},
    "bad words": {"bad_words": ("a", "é", "zz")},
    "at least": {"min_tokens": 12, "max_new_tokens": 20, "logit_bias": ((END, 9.0),)},
    "min-p": {"temperature": 1.3, "min_p": 0.2},
    "min-p, top-k and top-p": {"temperature": 2.0, "min_p": 0.01, "top_k": 40, "top_p": 0.8},
    "sampled with penalties": {
        "temperature": 0.9,
        "top_p": 0.95,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": ((77, 4.0),),
    },
    "everything": {
        "temperature": 1.5,
        "min_p": 0.02,
        "top_k": 50,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.3,
        "frequency_penalty": 0.7,
        "logit_bias": ((100, 2.0), (101, -3.0)),
        "allowed_token_ids": (END, *range(20, 200)),
        "bad_words": ("x",),
        "min_tokens": 5,
    },
}
"""Parameters by the name of the case. Their texts differ from those without, which `check` sees."""


def prompts_of_cases(each: int = 2, seed: int = 0) -> list[Prompt]:
    """Returns rows of every case, shuffled with as many rows that use none of it; an id begins with its case."""
    cases = [(name, params) for name, params in CASES.items() for _ in range(each)]
    cases += [("plain", {}), ("sampled", {"temperature": 0.8, "top_p": 0.9})] * (len(cases) // 4)
    random.Random(seed).shuffle(cases)
    rows = random_prompts(len(cases), longest=40, max_new_tokens=16)
    for row, (name, params) in zip(rows, cases, strict=True):
        row.id = f"{name} #{row.index}"
        row.params = SamplingParams(**{"max_new_tokens": 16} | params)
    return rows


class Reference:
    """Decodes rows of a tiny model, one at a time."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def tokens(self, prompt: Prompt) -> list[int]:
        """Returns what the row generates, up to and including the token that ends it."""
        numbers = random.Random(prompt.row_seed)
        found: list[int] = []
        ends = {*self._model.tokenizer.end_tokens, *prompt.params.stop_token_ids}
        while len(found) < prompt.params.max_new_tokens:
            ids = torch.tensor([[*prompt.tokens, *found]])
            with torch.inference_mode():
                logits = self._model.model(ids, use_cache=False).logits[:, -1].float()
            found.append(self._choose(prompt, ids, logits, numbers))
            if found[-1] in ends:
                break
        return found

    def _choose(self, prompt: Prompt, ids: torch.Tensor, logits: torch.Tensor, numbers: random.Random) -> int:
        params = prompt.params
        logits = self._edit(prompt, ids, logits)
        if params.temperature == 0:
            return int(logits.argmax())
        warpers: list[Any] = [TemperatureLogitsWarper(params.temperature)]
        warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
        warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
        warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
        kept = LogitsProcessorList(warpers)(ids, logits.double())
        cumulative = kept.softmax(-1).cumsum(-1)[0]
        return int(torch.searchsorted(cumulative, numbers.random() * cumulative[-1], right=True))

    def _edit(self, prompt: Prompt, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        params, width = prompt.params, len(prompt.tokens)
        ends = sorted({*self._model.tokenizer.end_tokens, *params.stop_token_ids})
        processors: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = []
        if params.allowed_token_ids:
            logits = torch.full_like(logits, -torch.inf).index_copy(
                1, torch.tensor(params.allowed_token_ids), logits[:, list(params.allowed_token_ids)]
            )
        if params.min_tokens:
            processors.append(MinNewTokensLengthLogitsProcessor(width, params.min_tokens, ends))
        if params.logit_bias:
            processors.append(SequenceBiasLogitsProcessor({(token,): float(bias) for token, bias in params.logit_bias}))
        if params.bad_words:
            # Transformers looks at the prompt, too: it is given the text alone.
            banned = NoBadWordsLogitsProcessor(
                [self._model.tokenizer.tokenize([word], special=False)[0] for word in params.bad_words],
                eos_token_id=[],
            )
            processors.append(lambda ids, scores: banned(ids[:, width:], scores))
        if params.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        for processor in processors:
            logits = processor(ids, logits)
        counts = torch.bincount(ids[0, width:], minlength=logits.shape[1])
        return logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


def without(prompt: Prompt) -> Prompt:
    """Returns the row with what makes its case taken away, all but how it is sampled."""
    kept = SamplingParams(prompt.params.max_new_tokens, prompt.params.temperature, prompt.params.top_p)
    return dataclasses.replace(prompt, params=kept)


def check(found: dict[str, Sequence[int]], prompts: Sequence[Prompt], reference: Reference) -> None:
    """Every row has the reference's tokens; of each case some row has others than it would have without it."""
    changed: dict[str, bool] = {}
    for prompt in prompts:
        expected = reference.tokens(prompt)
        assert list(found[prompt.id]) == expected, prompt.id
        name = prompt.id.partition(" #")[0]
        changed[name] = changed.get(name, False) or expected != reference.tokens(without(prompt))
    assert not changed.pop("plain")
    assert not changed.pop("sampled")
    assert [name for name, differs in changed.items() if not differs] == []
