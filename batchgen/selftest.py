"""Whether a batch has changed the text: rows of the first batch, looked at again alone.

A wrong mask, wrong positions or a broken kernel give fluent nonsense to rows that are padded or not the first, and no
error. So the tokens that a row was given in its batch, step by step over the cache, are judged by one forward of this
row alone over prompt and generation: each must be the best there, or as good as the best but for rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from batchgen.engine import EngineError
from batchgen.types import Prompt

ROWS = 2  # looked at: with offload each costs a whole pass over the weights
TOKENS = 32  # of each, at most

# How far below the best a token may be, in standard deviations of the logits at its place. Rounding to 16 bits moves a
# logit by some hundredths of that, to 32 bits by some millionths; a wrong mask moves it by one or more.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_TOLERANCE_OF_16_BITS = 0.25


class TextChanged(EngineError):
    """A row was given a token in its batch that one forward of it alone would not choose."""


def choose(batch: Sequence[Prompt]) -> list[int]:
    """The rows of `batch` to look at: of the greedy ones the shortest and the longest prompt, which is padded least."""
    greedy = [row for row, prompt in enumerate(batch) if prompt.params.temperature == 0]
    greedy.sort(key=lambda row: len(batch[row].tokens))
    return greedy if len(greedy) <= ROWS else [greedy[0], greedy[-1]]


def logits_of(model: Any, prompt: Sequence[int], tokens: Sequence[int], device: torch.device) -> torch.Tensor:
    """By one forward without a cache, the logits at the places of the first `tokens`, [tokens, vocabulary], float32."""
    tokens = tokens[:TOKENS]
    whole = torch.tensor([[*prompt, *tokens[:-1]]], device=device)
    last = {}
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        last = {"logits_to_keep": len(tokens)}
    with torch.inference_mode():
        output = model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False, **last)
        found: torch.Tensor = output.logits[0, -len(tokens) :].float()
    return found


def check(
    model: Any, prompt: Prompt, tokens: Sequence[int], rows: int, device: torch.device, decode: Callable[..., str]
) -> None:
    """Looks at the first `tokens` that `prompt` was given in a batch of `rows` rows.

    Raises:
        TextChanged: alone, the model would not have said this; the message has the evidence.
        EngineError: its logits are not finite.
    """
    tokens = list(tokens[:TOKENS])
    with torch.inference_mode():
        logits = logits_of(model, prompt.tokens, tokens, device)
        chosen = logits.gather(1, torch.tensor(tokens, device=device)[:, None]).squeeze(1)
        best, alone = logits.max(dim=1)
        behind = (best - chosen) / logits.std(dim=1)
    tolerance = _TOLERANCE.get(model.dtype, _TOLERANCE_OF_16_BITS)
    # Not "> tolerance": a NaN is beyond all rounding, too.
    wrong = [place for place, distance in enumerate(behind.tolist()) if not distance <= tolerance]
    if wrong:
        place = wrong[0]
        kind = TextChanged if bool(behind.isfinite().all()) else EngineError
        raise kind(
            f"self-test: in a batch of {rows}, row {prompt.id!r} was given {decode([tokens[place]])!r} (token "
            f"{tokens[place]}) as its token {place + 1}; alone, {decode([int(alone[place])])!r} (token "
            f"{int(alone[place])}) is better by {behind[place]:.2g} standard deviations of the logits, where rounding "
            f"explains {tolerance:g}. Batches change the text of this model here. Compare --batch-size 1 and another "
            "--engine or attn_implementation; --no-selftest goes on all the same"
        )
