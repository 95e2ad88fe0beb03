"""What engine `paged` owes a family in bfloat16: log-probabilities as good as those of Transformers in bfloat16.

Rounding decides between tokens that are nearly equal, so the rows themselves are not compared. What is compared is the
log-probability of each token that `paged` has generated with that of a forward in float64, of the same rounded weights
over the same text. The error of Transformers' own forward in bfloat16 on the same device stands beside it, and is what
the tolerance is stated in.

A window that is off by one, or logits that are scaled by 1 % too little, are more than rounding and are found. A scale
of attention that is off by 1 % is less, and so may be a cap that is left out: those are for `contract`, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from batchgen.engine import EngineError, Setup
from batchgen.engines.paged import models
from batchgen.engines.paged.engine import Paged
from batchgen.engines.paged.models import longrope
from batchgen.models import footprint, loading
from batchgen.types import Generation, Prompt, SamplingParams
from batchgen.world import World
from tests import tiny_models
from tests.engines.paged.families import contract
from tests.engines.paged.families.dense import Config

DTYPE = torch.bfloat16

# The tolerance. That of a factor is what two samples of the errors of one model differ by, drawn from the rows of 22
# families on a CPU, 12 rows each, of different texts: 19 of 20 pairs of medians by a factor of 1.0 to 1.6, and of 99 %
# quantiles by one of 1.0 to 1.5 in dense families. The errors that are compared here are of the same texts, and nearer.
# A mixture exchanges experts of nearly equal scores, by which one to three tokens of a hundred are off by up to 6; its
# 99 % quantiles differ by chance (by a factor of 4.6), and its 97 % quantile is compared: by at most 1.6 of the other's
# 99 %. The constants are less than half of the smallest median, and about the smallest 99 % quantile (of Granite).
_MEDIAN_FACTOR, _MEDIAN_MARGIN = 1.5, 2e-4
_HIGH_FACTOR, _HIGH_MARGIN = 2.0, 2e-3
_HIGH, _HIGH_OF_MIXTURES = 0.99, 0.97  # quantiles of `paged`'s errors, compared with the 0.99 of Transformers' own

_ROWS_AT_ONCE = 8  # what is made for them is small, so that many processes can share a GPU
_CACHE = 256  # tokens, unless a row is longer: rows are preempted
_LEAST_STEP, _LONG_STEPS = 64, 12  # tokens of a step, and steps that a prompt longer than a window is computed in
_TEXTS = 0.7  # of the rows must have a text that no other has, or it says little


@dataclass(frozen=True)
class Errors:
    """How far log-probabilities are from exact ones."""

    median: float
    high: float  # 97 or 99 of 100 are at most this
    largest: float

    @classmethod
    def of(cls, differences: torch.Tensor, high: float = _HIGH) -> Errors:
        """Those of `differences`, [tokens]; `high` is a quantile."""
        sizes = differences.abs()
        return cls(float(sizes.median()), float(sizes.quantile(high)), float(sizes.max()))

    def __str__(self) -> str:
        return f"{self.median:.4f}, {self.high:.4f}, {self.largest:.4f}"


@dataclass(frozen=True)
class Outcome:
    """What became of the rows of a family."""

    rows: int
    texts: int  # different ones
    tokens: int  # of all rows
    paged: Errors
    own: Errors  # of Transformers in the same type, on the same device
    device: str

    @property
    def is_kept(self) -> bool:
        """Whether the errors of `paged` are within the tolerance, by rows that say something; NaN is not."""
        return (
            self.paged.median <= _MEDIAN_FACTOR * self.own.median + _MEDIAN_MARGIN
            and self.paged.high <= _HIGH_FACTOR * self.own.high + _HIGH_MARGIN
            and self.texts > self.rows * _TEXTS
        )


def find_refusal(settings: Config) -> str:
    """Returns why the kernels of a GPU do not take a model's heads in bfloat16; "" if they do, or there is no GPU."""
    try:
        if loading.device_of(World()).type == "cuda":
            models.check_dtype(contract.make_config(settings), DTYPE)
    except EngineError as error:
        return str(error)
    return ""


def check(settings: Config, folder: Path, count: int = 12, planted: Config | None = None) -> Outcome:
    """Builds a model in `folder`, runs `count` greedy rows in bfloat16 on the device that there is, and compares them.

    Args:
        planted: what is different in the config.json that `paged` reads, to see that the comparison finds it.

    Raises:
        EngineError: `paged` refuses the model, or a row has failed.
    """
    path = tiny_models.save(folder, lambda _: contract.build(settings))
    device = loading.device_of(World())
    own = loading.load(str(path), {"dtype": DTYPE, "device_map": {"": str(device)}})
    exact = loading.load(str(path), {"dtype": torch.float32})
    exact.load_state_dict(own.state_dict())  # the rounded weights; a model keeps some of them in float32
    exact.double().set_experts_implementation("eager")  # torch's grouped product knows no float64
    config = exact.config
    limit = contract.find_window(config) or longrope.find_original_context(config) or 0
    rows = [_ask(prompt) for prompt in contract.make_prompts(count, limit)]
    _plant(path, planted or {})
    found = _run(path, rows)
    texts = [(row.tokens, _find_tokens(found[row.id])) for row in rows]
    given = torch.cat([torch.tensor(found[row.id].logprobs, dtype=torch.float64) for row in rows])
    right, beside = (torch.cat([_score(model, *text) for text in texts]) for model in (exact, own))
    is_mixture = footprint.find_experts_per_token(config) > 0
    return Outcome(
        count,
        len({tuple(tokens) for _, tokens in texts}),
        len(right),
        Errors.of(given - right, _HIGH_OF_MIXTURES if is_mixture else _HIGH),
        Errors.of(beside - right),
        device.type,
    )


def _plant(path: Path, planted: Config) -> None:
    written = path / "config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | planted))


def _ask(prompt: Prompt) -> Prompt:
    """Returns a greedy row with that prompt, which asks for log-probabilities."""
    params = SamplingParams(max_new_tokens=prompt.params.max_new_tokens, logprobs=True, return_token_ids=True)
    return Prompt(prompt.index, prompt.id, prompt.line, "", prompt.tokens, params, {})


def _run(path: Path, rows: Sequence[Prompt]) -> dict[str, Generation]:
    """Returns the generations of the rows by id, all from one engine, since a GPU compiles the model for each.

    The engine's own self-test is off: it would refuse a model here without saying how far it is off.
    """
    longest = max(len(row.tokens) + row.params.max_new_tokens for row in rows)
    options = Paged.Options(
        step_tokens=max(_LEAST_STEP, longest // _LONG_STEPS), cache_tokens=max(_CACHE, longest), expected_share=0.05
    )
    setup = Setup(str(path), "bfloat16", _ROWS_AT_ONCE, World(), selftest=False)
    with Paged(setup, options) as engine:
        batches = list(engine.generate(iter(rows), lambda: False))
    return {each.id: each for batch in batches for each in batch.generations}


def _find_tokens(generation: Generation) -> Sequence[int]:
    """Returns the tokens of a row; raises `EngineError` if it has failed."""
    if generation.error is not None or generation.details is None:
        raise EngineError(f"{generation.id} failed: {generation.error}")
    return generation.details.token_ids or ()


def _score(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """Returns the log-probabilities of `tokens` behind `prompt`, float64 [tokens], by one forward over the text."""
    ids = torch.tensor([[*prompt, *tokens]], device=model.device)
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].double().cpu()
