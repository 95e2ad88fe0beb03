"""Rows whose logits are not finite: nothing follows from such numbers, so the row fails.

A product beyond the largest number of float16 (65,504), a damaged weight, or an embedding of infinity makes NaN. The
argmax of NaN is a token id like any other, so that without this check the row would have a text, and be called good.
A logit of minus infinity is no error by itself: it is a token that cannot be chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor

from batchgen.types import Generation, Prompt

_REMEDIES = {
    "float16": "Numbers above 65,504 do not fit into float16: use --dtype bfloat16 or float32",
    "bfloat16": "Use --dtype float32, or look at the model's weights",
    "int8": "Use --dtype bfloat16 or float32",
    "nf4": "Use --dtype bfloat16 or float32",
}
_NO_REMEDY = "No --dtype has more room: the model's weights, or its embedding of a token of this prompt, are not finite"


def are_finite(best: torch.Tensor) -> torch.Tensor:
    """Returns which rows are finite, bool [rows], by the largest logit of each, [rows]: NaN and infinity show in it."""
    return best.abs() < torch.inf


class NotFinite(LogitsProcessor):
    """Marks the rows of the current step whose logits are not finite, and leaves the logits as they are.

    Args:
        agree: overwrites numbers, [rows], with those of the first of several ranks; None: there is one rank.
    """

    def __init__(self, agree: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self._agree = agree
        self.rows = torch.empty(0, dtype=torch.bool)
        """The marks of the current step, bool [rows]; rows that have ended before it may be marked, too."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.rows = ~are_finite(scores.amax(-1))
        if self._agree is not None:
            self.rows = self._agree(self.rows.long()).bool()
        return scores


def dtype_of(model: Any) -> str:
    """Returns the name that `--dtype` has for the type that a loaded model computes with."""
    if getattr(model, "is_loaded_in_8bit", False):
        return "int8"
    if getattr(model, "is_loaded_in_4bit", False):
        return "nf4"
    return str(model.dtype).removeprefix("torch.")


def find_remedy(dtype: str) -> str:
    """Returns what to do about numbers that are not finite in `dtype`: a sentence without its full stop."""
    return _REMEDIES.get(dtype, _NO_REMEDY)


def fail(prompt: Prompt, dtype: str) -> Generation:
    """Returns the failed generation of a prompt for which the model's numbers are not finite."""
    return Generation.failed(
        prompt,
        "not_finite",
        f"line {prompt.line}: the model's numbers for this row are not finite in {dtype} (its logits hold NaN or "
        f"infinity). {find_remedy(dtype)}",
    )
