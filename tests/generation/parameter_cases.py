"""What each parameter of a row must do to its tokens: cases, and a reference that decodes one row with plain code.

The reference has one forward a token, without a cache, and changes the logits by Transformers' own processors where
there are some; else by what the definition says. Cases are for rows in float32, in any engine.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
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

from batchgen.requests.constraints import make_grammar
from batchgen.types import Constraint, Generation, Markup, Prompt, SamplingParams, Thinking
from tests.generation.plain_random_numbers import find_gumbel
from tests.tiny_models import END, Model, random_prompts

FEW_LETTERS = tuple(range(68, 76))  # a to h: bytes follow four special tokens, in the order of their characters
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "kind": {"enum": ["é", "x"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
THINKS = Markup(Thinking("<t>", "</t>", is_open=True))

CASES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "repetition below 1": {"repetition_penalty": 0.8},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.5},
    "negative penalties": {"frequency_penalty": -0.5, "presence_penalty": -1.0},
    "bias": {"logit_bias": ((40, 6.0), (41, 5.5), (42, -100.0), (END, -2.5))},
    "allowed": {"allowed_token_ids": (END, *range(60, 90))},
    "allowed and biased": {"allowed_token_ids": tuple(range(30, 60)), "logit_bias": ((31, 3.0), (200, 50.0))},
    "bad word of one token": {"bad_words": ("a", "c"), "allowed_token_ids": FEW_LETTERS},
    "bad words": {
        "bad_words": ("ab", "ba", "ddd", "fe", "gg", "h"),
        "allowed_token_ids": FEW_LETTERS,
        "temperature": 3.0,
    },
    "at least": {"min_tokens": 12, "max_new_tokens": 20, "logit_bias": ((END, 9.0),)},
    "no end": {"ignore_eos": True, "logit_bias": ((END, 6.0),), "temperature": 1.0},
    "stop tokens": {"stop_token_ids": tuple(range(80, 110)), "min_tokens": 3},
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
    "choice": {"constraint": Constraint("choice", '["yes", "no", "dépend"]'), "temperature": 1.0},
    "regex": {"constraint": Constraint("regex", "(ab?|[x-z])+!"), "max_new_tokens": 12},
    "grammar": {"constraint": Constraint("grammar", 'start: item ("," item)*\nitem: /[0-9]+/'), "min_tokens": 6},
    "schema": {
        "constraint": Constraint("json_schema", json.dumps(SCHEMA)),
        "temperature": 1.0,
        "frequency_penalty": 1.0,
        "max_new_tokens": 60,
    },
    "budget": {"thinking_tokens": 5, "markup": THINKS},
    "no thinking": {"thinking_tokens": 0, "markup": THINKS, "temperature": 1.0},
    "thinking, then a choice": {
        "thinking_tokens": 6,
        "markup": THINKS,
        "constraint": Constraint("choice", '["yes", "no"]'),
        "repetition_penalty": 1.3,
    },
}
"""Parameters by the name of the case; beside them, what the model marks. `check` sees that each changes some text."""


def prompts_of_cases(each: int = 2, seed: int = 0) -> list[Prompt]:
    """Returns rows of every case, shuffled with rows that use none of it; an id begins with its case."""
    cases = [(name, params) for name, params in CASES.items() for _ in range(each)]
    cases += [("plain", {}), ("sampled", {"temperature": 0.8, "top_p": 0.9})] * (len(cases) // 4)
    random.Random(seed).shuffle(cases)
    rows = random_prompts(len(cases), longest=40, max_new_tokens=16)
    for row, (name, params) in zip(rows, cases, strict=True):
        own = {"max_new_tokens": 16, "return_token_ids": True} | params
        row.id, row.markup = f"{name} #{row.index}", own.pop("markup", None)
        row.params = SamplingParams(**own)
    return rows


_CHOICES: dict[str, Sequence[Any]] = {
    "temperature": (0.0, 0.7, 1.0, 1.8),
    "top_p": (0.6, 0.9),
    "top_k": (3, 40),
    "min_p": (0.05, 0.3),
    "seed": (1, 2),
    "repetition_penalty": (0.9, 1.2, 1.6),
    "presence_penalty": (-0.5, 1.0),
    "frequency_penalty": (-0.2, 0.4),
    "logit_bias": (((END, 4.0),), ((68, 3.0), (69, -5.0), (70, 2.5))),
    "allowed_token_ids": ((END, *range(40, 140)), (*FEW_LETTERS, END)),
    "bad_words": (("a", "bc"), ("de", "ee")),
    "min_tokens": (2, 7),
    "stop_token_ids": ((70, 71), tuple(range(100, 130))),
    "ignore_eos": (True,),
    "constraint": (
        Constraint("regex", "([a-h]{2}[.,])+"),
        Constraint("json_schema", json.dumps({"type": "array", "items": {"enum": ["a", "bad", 3]}})),
    ),
    "thinking_tokens": (0, 3),
}


def mixtures(count: int, seed: int = 0) -> list[Prompt]:
    """Returns rows, each with a random mixture of parameters; some are impossible together."""
    source = random.Random(seed)
    rows = random_prompts(count, longest=40)
    for row in rows:
        names = source.sample(sorted(_CHOICES), source.randrange(1, 8))
        params = {name: source.choice(_CHOICES[name]) for name in names}
        row.id, row.markup = f"mixture #{row.index}", THINKS if "thinking_tokens" in params else None
        row.params = SamplingParams(max_new_tokens=18, return_token_ids=True, **params)
    return rows


class Reference:
    """Decodes rows of a tiny model, one at a time."""

    def __init__(self, model: Model) -> None:
        self._model, self._tokenizer = model, model.tokenizer
        definition = model.tokenizer.read_definition()
        assert definition is not None
        self._constrained = LLTokenizer(definition, eos_token=model.tokenizer.end_tokens)

    def tokens(self, prompt: Prompt) -> list[int]:
        """Returns what the row generates, up to and including the token that ends it; [] if no token is left for it."""
        params = prompt.params
        found: list[int] = []
        ends = {*([] if params.ignore_eos else self._tokenizer.end_tokens), *params.stop_token_ids}
        end_mark = self._tokenizer.tokenize(["</t>"], special=False)[0]
        thinks = prompt.markup is not None
        matcher = None
        if params.constraint is not None:
            matcher = LLMatcher(self._constrained, make_grammar(params.constraint))
        while len(found) < params.max_new_tokens:
            ids = torch.tensor([[*prompt.tokens, *found]])
            with torch.inference_mode():
                logits = self._model.model(ids, use_cache=False).logits[:, -1].float()
            token = self._choose(prompt, ids, logits, None if thinks else matcher)
            if token is None:
                return []
            if thinks and params.thinking_tokens is not None and len(found) >= params.thinking_tokens:
                token = end_mark[len(found) - params.thinking_tokens]
            found.append(token)
            if token in ends:
                break
            if matcher is not None and not thinks:
                assert matcher.consume_token(token), matcher.get_error()
                if matcher.is_stopped():
                    break
            thinks = thinks and found[-len(end_mark) :] != list(end_mark)
        return found

    def _choose(
        self,
        prompt: Prompt,
        ids: torch.Tensor,
        logits: torch.Tensor,
        matcher: LLMatcher | None,
    ) -> int | None:
        params = prompt.params
        if matcher is not None:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            logits = logits.masked_fill(torch.from_numpy(bits[: logits.shape[1]] == 0), -torch.inf)
        logits = self._edit(prompt, ids, logits)
        if not logits.isfinite().any():
            return None
        if params.temperature == 0:
            return int(logits.argmax())
        warpers: list[Any] = [TemperatureLogitsWarper(params.temperature)]
        warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
        warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
        warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
        kept = LogitsProcessorList(warpers)(ids, logits.double())[0]
        step = ids.shape[1] - len(prompt.tokens)
        sums = {
            token: float(kept[token]) + find_gumbel(prompt.row_seed, step, token)
            for token in kept.isfinite().nonzero()[:, 0].tolist()
        }
        return max(sums, key=lambda token: sums[token])  # the first of equal ones

    def _edit(self, prompt: Prompt, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        params, width = prompt.params, len(prompt.tokens)
        ends = sorted({*self._tokenizer.end_tokens, *params.stop_token_ids})
        processors: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = []
        if params.allowed_token_ids:
            allowed = list(params.allowed_token_ids)
            nothing = torch.full_like(logits, -torch.inf)
            logits = nothing.index_copy(1, torch.tensor(allowed), logits[:, allowed])
        if params.min_tokens:
            processors.append(MinNewTokensLengthLogitsProcessor(width, params.min_tokens, ends))
        if params.logit_bias:
            processors.append(SequenceBiasLogitsProcessor({(token,): float(bias) for token, bias in params.logit_bias}))
        if params.bad_words:
            words = [self._tokenizer.tokenize([word], special=False)[0] for word in params.bad_words]
            banned = NoBadWordsLogitsProcessor(words, eos_token_id=[])
            # Transformers looks at the prompt, too: it is given the text alone.
            processors.append(lambda ids, scores: banned(ids[:, width:], scores))
        if params.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        for processor in processors:
            logits = processor(ids, logits)
        counts = torch.bincount(ids[0, width:], minlength=logits.shape[1])
        return logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


def without(prompt: Prompt) -> Prompt:
    """Returns the row without what makes its case: all but how it is sampled, and what lets the case show."""
    params = prompt.params
    kept: dict[str, Any] = {name: getattr(params, name) for name in ("max_new_tokens", "temperature", "top_p")}
    if params.bad_words:
        kept["allowed_token_ids"] = params.allowed_token_ids
    if params.min_tokens or params.ignore_eos:
        kept["logit_bias"] = params.logit_bias
    return dataclasses.replace(prompt, params=SamplingParams(**kept), markup=None)


def check(found: Mapping[str, Generation], prompts: Sequence[Prompt], reference: Reference) -> None:
    """Every row has the reference's tokens; of each case some row has others than it would have without it."""
    changed: dict[str, bool] = {}
    for prompt in prompts:
        generation, expected = found[prompt.id], reference.tokens(prompt)
        assert generation.error is None, (prompt.id, generation.error)
        assert generation.details is not None
        assert list(generation.details.token_ids or ()) == expected, prompt.id
        assert generation.generated_tokens == len(expected)
        name = prompt.id.partition(" #")[0]
        changed[name] = changed.get(name, False) or expected != reference.tokens(without(prompt))
    assert sorted(name for name, differs in changed.items() if not differs) == ["plain", "sampled"]
