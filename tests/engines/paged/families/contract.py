"""What engine `paged` owes a family: its rows are those of Transformers, each computed alone.

The same prompts are greedy rows and sampled ones. Greedy rows must have the tokens of Transformers' own `generate`;
sampled ones those that are drawn by the row's random numbers from a forward of Transformers over the whole text.
Log-probabilities are compared with a forward in float64. The cache is so small that rows are preempted, steps are so
short that prompts are computed in chunks, and every third prompt begins alike.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from batchgen.engine import Setup
from batchgen.engines.paged.engine import Paged
from batchgen.engines.paged.models import coverage, longrope, trial
from batchgen.generation.sampling import SamplingTensors, sample
from batchgen.models import architectures
from batchgen.types import Generation, Prompt, SamplingParams
from batchgen.world import World
from tests import tiny_models
from tests.engines.paged.families.dense import Config

MOST_APART = 1e-4  # of log-probabilities in float32, from those in float64

_GAIN = 1.7  # of each product: with less, the text of a model repeats itself
_AROUND = 0.3  # standard deviation of biases, sinks, and the weights of norms around what they begin with
_CACHE = 256  # tokens, for all rows at once: enough for each, and not for four
_LONG_STEPS = 12  # that a prompt longer than a window is computed in, about
_BEYOND = 40  # tokens by which long prompts go beyond a window, or the original context of stretched positions
_MOST_TIES = 1  # of a family: two experts that are equal but for rounding, of which Transformers itself takes either
_SAMPLINGS: tuple[dict[str, Any], ...] = ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.5, "top_k": 30})


@dataclass(frozen=True)
class Outcome:
    """What became of the rows of a family."""

    rows: int  # greedy ones, and as many sampled ones
    greedy: int  # rows that are equal to those of Transformers
    sampled: int
    apart: float  # the largest difference of a log-probability
    preemptions: int
    texts: int  # different ones among the greedy rows
    ties: (
        int  # greedy rows of which `generate` and a forward over the whole text differ, which have the latter's tokens
    )
    wrong: str = ""  # of the first row that is not equal, what it has and what Transformers gives

    @property
    def is_kept(self) -> bool:
        """Whether the contract is kept, by rows that say something."""
        are_equal = self.greedy == self.sampled == self.rows
        return (
            are_equal
            and self.ties <= _MOST_TIES
            and self.apart < MOST_APART
            and self.preemptions > 0
            and self.texts > self.rows * 0.7
        )


def make_config(settings: Config) -> Any:
    """Returns the config that Transformers reads from such a config.json."""
    settings = dict(settings)
    return CONFIG_MAPPING[settings.pop("model_type")].from_dict(settings)


def build(settings: Config) -> PreTrainedModel:
    """Returns a random model in float32 whose weights make every feature matter."""
    config = make_config(settings)
    attention = architectures.attention_arguments(config)
    model: PreTrainedModel = architectures.auto_class(config).from_config(config, dtype=torch.float32, **attention)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() > 1 and isinstance(tensor, torch.nn.Parameter):
                tensor.normal_(0, _GAIN * tensor.shape[-1] ** -0.5)
            elif isinstance(tensor, torch.nn.Parameter) or "correction_bias" in name:
                tensor.add_(torch.randn_like(tensor) * _AROUND)
    return model


def find_refusal(settings: Config) -> str:
    """Returns why `paged` does not cover such a model; "" if it does."""
    config = make_config(settings)
    return coverage.why_refused(config) or trial.find_difference(config)


def find_window(config: Any) -> int:
    """Returns the window of a model's attention, in tokens; 0: there is none, or it is as long as the context."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) or 0
    is_used = getattr(text, "use_sliding_window", True)
    return window if is_used and window < getattr(text, "max_position_embeddings", 0) else 0


def make_prompts(count: int, limit: int) -> list[Prompt]:
    """Returns `count` prompts, two of them longer than `limit` tokens, unless it is 0; every third begins alike."""
    made = tiny_models.random_prompts(count, longest=90)
    source = random.Random(2)
    beginning = [tiny_models.BEGIN, *range(10, 70)]
    for prompt in made[::3]:
        prompt.tokens = [*beginning, *list(prompt.tokens)[1 : source.randrange(2, 20)]]
    for prompt in made[1:3] if limit else ():
        prompt.tokens = [tiny_models.BEGIN, *(source.randrange(4, 260) for _ in range(limit + _BEYOND))]
    return made


def check(settings: Config, folder: Path, count: int = 60, step: int = 1) -> Outcome:
    """Builds a model in `folder`, runs `count` greedy and as many sampled rows, and compares them with Transformers.

    Args:
        step: of so many greedy rows, one is compared with `generate`, and the others as sampled ones are.
    """
    path = tiny_models.save(folder, lambda _: build(settings))
    model = tiny_models.Model(path)
    config = model.model.config
    prompts = make_prompts(count, find_window(config) or longrope.find_original_context(config) or 0)
    greedy = [_ask(prompt, prompt.index, {}) for prompt in prompts]
    sampled = [_ask(prompt, prompt.index + count, _SAMPLINGS[prompt.index % 2]) for prompt in prompts]
    found, preemptions = _run(path, [*greedy, *sampled])
    outcome = [_judge(model, row, found[row.id], row.index % step == 0) for row in (*greedy, *sampled)]
    wrong = next((each.wrong for each in outcome if each.wrong), "")
    return Outcome(
        count,
        sum(not each.wrong for each in outcome[:count]),
        sum(not each.wrong for each in outcome[count:]),
        max(each.apart for each in outcome),
        preemptions,
        len({found[row.id].text for row in greedy}),
        sum(each.is_tie for each in outcome),
        wrong,
    )


def _ask(prompt: Prompt, index: int, sampling: Mapping[str, Any]) -> Prompt:
    """Returns a row with that prompt; three of four ask for log-probabilities."""
    most, asks = prompt.params.max_new_tokens, index % 4 != 2
    params = SamplingParams(max_new_tokens=most, logprobs=asks, return_token_ids=True, **sampling)
    return Prompt(index, f"row-{index}", index + 1, "", prompt.tokens, params, {})


def _run(path: Path, rows: Sequence[Prompt]) -> tuple[dict[str, Generation], int]:
    """Returns the generations of the rows by id, and how often one was preempted.

    Rows beyond a window run after the others, since a cache that holds one of them is large enough for the others.
    """
    found: dict[str, Generation] = {}
    preemptions = 0
    for are_long in (False, True):
        part = [row for row in rows if (len(row.tokens) > _CACHE // 2) == are_long]
        longest = max((len(row.tokens) + row.params.max_new_tokens for row in part), default=0)
        options = Paged.Options(
            step_tokens=max(64, longest // _LONG_STEPS), cache_tokens=max(_CACHE, longest), expected_share=0.05
        )
        if not part:
            continue
        with Paged(Setup(str(path), "float32", 16, World()), options) as engine:
            batches = list(engine.generate(iter(part), lambda: False))
            found |= {each.id: each for batch in batches for each in batch.generations}
            preemptions += engine.preemptions
    return found, preemptions


@dataclass(frozen=True)
class _Judgement:
    """Of one row."""

    wrong: str
    apart: float
    is_tie: bool = False


def _judge(model: tiny_models.Model, row: Prompt, generation: Generation, generates: bool) -> _Judgement:
    """Compares the tokens of a row with those of Transformers, and its log-probabilities.

    Args:
        generates: a greedy row is generated anew, token by token.
    """
    tokens = list(generation.details.token_ids or ()) if generation.details else []
    is_sampled = row.params.temperature > 0
    expected = model.alone(row) if generates and not is_sampled else _choose_along(model, row, tokens)
    is_tie = tokens != expected and not is_sampled and tokens == _choose_along(model, row, tokens)
    if generation.error is not None:
        return _Judgement(f"{row.id} failed: {generation.error}", 0.0)
    if tokens != expected and not is_tie:
        return _Judgement(f"{row.id} has the tokens {tokens}, and Transformers gives {expected}", 0.0)
    if not row.params.logprobs:
        return _Judgement("" if generation.logprobs is None else f"{row.id} has log-probabilities", 0.0, is_tie)
    exact = model.logprobs(row, tokens)
    apart = max(abs(own - other) for own, other in zip(generation.logprobs or (), exact, strict=True))
    return _Judgement("", apart, is_tie)


def _choose_along(model: tiny_models.Model, row: Prompt, tokens: Sequence[int]) -> list[int]:
    """Returns the tokens that Transformers gives a row, if they are `tokens`; else up to the first other one.

    One forward computes all places, since each token is compared before what follows it.
    """
    params, count = row.params, row.params.max_new_tokens
    with torch.inference_mode():
        ids = torch.tensor([[*row.tokens, *tokens]])
        logits = model.model(ids, use_cache=False).logits[0, len(row.tokens) - 1 :][:count].float()
    chosen: list[int] = logits.argmax(-1).tolist()
    if params.temperature:
        steps = torch.arange(len(logits))
        seeds = torch.full_like(steps, row.row_seed - (row.row_seed >> 63 << 64))
        chosen = sample(logits, seeds, steps, SamplingTensors.of([params] * len(logits), ids.device)).tolist()
    for place, token in enumerate(chosen):
        if token in model.tokenizer.end_tokens or place >= len(tokens) or token != tokens[place]:
            return chosen[: place + 1]
    return chosen
