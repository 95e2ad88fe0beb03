"""Whether a batch has changed the text: rows of the first batch, looked at again alone.

A wrong mask, wrong positions or a broken kernel give fluent nonsense to rows that are padded or not the first, and no
error. So the tokens that a row was given in its batch, step by step over the cache, are judged by one forward of this
row alone over prompt and generation: each must be the best there, or as good as the best but for rounding.

How far rounding moves a logit depends on the model, and with int8 on the rows beside: bitsandbytes rounds activations
too, and which of their columns it leaves out depends on the whole batch. So where a token is further behind than usual
rounding explains, rounding is measured: the row once more, beside another row of the same length, which needs no
padding, no mask and no cache, and so shows nothing but rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from batchgen.engine import EngineError
from batchgen.generation import finite
from batchgen.types import Prompt, SamplingParams

ROWS = 2  # looked at: with offload each costs a whole pass over the weights
TOKENS = 32  # of each, at most

# How far below the best a token may be, in standard deviations of the logits at its place. Rounding to 16 bits moves a
# logit by some hundredths of that, to 32 bits by some millionths; a wrong mask moves it by one or more.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_TOLERANCE_OF_16_BITS = 0.25
_MOST = 0.75  # whatever was measured: what moves a logit further is no rounding
_MARGIN = 4.0  # of the rounding of one logit: three standard deviations of the difference of two, 3 * 2**0.5


class TextChanged(EngineError):
    """A row was given a token in its batch that one forward of it alone would not choose."""


def choose(batch: Sequence[Prompt]) -> list[int]:
    """Returns the rows of `batch` to look at: of the greedy ones those with the shortest and the longest prompt.

    Rows whose logits are changed or masked, or whose tokens may be forced, are none of them: theirs need not be the
    model's best.
    """
    greedy = [row for row, prompt in enumerate(batch) if _is_models_best(prompt.params)]
    greedy.sort(key=lambda row: len(batch[row].tokens))
    return greedy if len(greedy) <= ROWS else [greedy[0], greedy[-1]]


def _is_models_best(params: SamplingParams) -> bool:
    is_free = params.constraint is None and params.thinking_tokens is None
    return params.temperature == 0 and is_free and not params.edits_logits


class Compute(Protocol):
    """A forward of one row alone, without a cache."""

    def __call__(self, ids: torch.Tensor, kept: int) -> torch.Tensor:
        """Returns the logits at the last `kept` places of `ids` [1, tokens]: [kept, vocabulary]."""


def compute_logits(model: Any, ids: torch.Tensor, kept: int) -> torch.Tensor:
    """Computes as `Compute` says, by the own forward of a model of Transformers."""
    last = {}
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        last = {"logits_to_keep": kept}
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **last)
    logits: torch.Tensor = output.logits[0, -kept:]
    return logits


def logits_of(compute: Compute, prompt: Sequence[int], tokens: Sequence[int], device: torch.device) -> torch.Tensor:
    """Computes, by one forward without a cache, the logits at the places of the first `tokens`.

    Returns:
        float32 [tokens, vocabulary], of 32 tokens at most.
    """
    tokens = tokens[:TOKENS]
    whole = torch.tensor([[*prompt, *tokens[:-1]]], device=device)
    with torch.inference_mode():
        return compute(whole, len(tokens)).float()


def rounding_of(
    model: Any, prompt: Sequence[int], tokens: Sequence[int], logits: torch.Tensor, device: torch.device
) -> float:
    """Measures how far rounding moves a logit (root mean square), in standard deviations of the logits at its place.

    Args:
        logits: as `logits_of` gives them for the same `prompt` and `tokens`.
    """
    whole = [*prompt, *tokens[: TOKENS - 1]]
    beside = torch.tensor([whole, whole[::-1]], device=device)
    output = model(input_ids=beside, attention_mask=torch.ones_like(beside), use_cache=False)
    moved = output.logits[0, len(prompt) - 1 : len(prompt) - 1 + len(logits)].float() - logits
    return float((moved / logits.std(dim=1, keepdim=True)).square().mean().sqrt())


@dataclass(frozen=True)
class SelfTest:
    """Looks at rows of a batch again, alone."""

    model: Any
    device: torch.device
    decode: Callable[[Sequence[int]], str]
    rows: int  # of the batch, or most rows at once
    measures: bool = True  # rounding may be measured: no other rank takes part in a forward without being told
    compute: Compute | None = None  # None: the model's own forward
    rounds_cache: bool = False  # keys and values are rounded to 8 bits

    def check(self, prompt: Prompt, tokens: Sequence[int]) -> None:
        """Looks at the first `tokens` that `prompt` was given.

        Raises:
            TextChanged: alone, the model would not have said this; the message has the evidence.
            EngineError: its logits are not finite.
        """
        tokens = list(tokens[:TOKENS])
        compute = self.compute or partial(compute_logits, self.model)
        with torch.inference_mode():
            logits = logits_of(compute, prompt.tokens, tokens, self.device)
            if not finite.are_finite(logits.amax(dim=1)).all():
                raise EngineError(self._describe_not_finite(prompt))
            given = logits.gather(1, torch.tensor(tokens, device=self.device)[:, None]).squeeze(1)
            best, alone = logits.max(dim=1)
            behind = (best - given) / logits.std(dim=1)
            tolerance = self._find_tolerance()
            if self.measures and behind.max() > tolerance:
                measured = _MARGIN * rounding_of(self.model, prompt.tokens, tokens, logits, self.device)
                tolerance = max(tolerance, min(_MOST, measured))
        wrong = [place for place, distance in enumerate(behind.tolist()) if not distance <= tolerance]
        if wrong:
            place = wrong[0]
            given_token, best_token = self._name_token(tokens[place]), self._name_token(int(alone[place]))
            raise TextChanged(
                f"self-test: {self._situation}, row {prompt.id!r} was given {given_token} as its token {place + 1}; "
                f"computed again {self._comparison}, {best_token} is better by {behind[place]:.2g} "
                f"standard deviations of the logits, where rounding explains {tolerance:.2g}. "
                f"{self._advice}; --no-selftest goes on all the same"
            )

    def _find_tolerance(self) -> float:
        # Of numbers that are rounded to 8 bits, one at the border of two goes either way by any other rounding.
        if self.rounds_cache or any(getattr(module, "rounds_inputs", False) for module in self.model.modules()):
            return _TOLERANCE_OF_16_BITS
        return _TOLERANCE.get(self.model.dtype, _TOLERANCE_OF_16_BITS)

    def _describe_not_finite(self, prompt: Prompt) -> str:
        dtype = finite.dtype_of(self.model)
        return (
            f"self-test: the model's numbers for row {prompt.id!r} are not finite in {dtype} when the row is computed "
            f"again {self._comparison}. {finite.find_remedy(dtype)}; --no-selftest goes on all the same"
        )

    def _name_token(self, token: int) -> str:
        return f"{self.decode([token])!r} (token {token})"

    @property
    def _situation(self) -> str:
        return f"in a batch of {self.rows}" if self.rows > 1 else "step by step"

    @property
    def _comparison(self) -> str:
        return "alone" if self.rows > 1 else "in one forward"

    @property
    def _advice(self) -> str:
        if self.rows > 1:
            return (
                "Batches change the text of this model here. Compare --batch-size 1 and another --engine or "
                "attn_implementation"
            )
        return "The cache changes the text of this model here. Compare another --engine or attn_implementation"
