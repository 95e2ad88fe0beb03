"""Rows that have ended, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchgen.generation import finite, refusals, selftest
from batchgen.generation.stopping import generation
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Generation, Prompt


@dataclass(frozen=True, slots=True)
class Finished:
    """A row that has ended."""

    prompt: Prompt
    tokens: list[int] | None  # generated, up to and including the one that ended it; None: it has failed
    stopped: bool = False  # by an end of sequence or a stop text, not by its length
    logprobs: list[float] | None = None  # of `tokens`, if the prompt asks for them
    not_finite: bool = False  # why it has failed: the model's numbers; else there is no room for it


def generation_of(row: Finished, tokenizer: HfTokenizer, dtype: str) -> Generation:
    """The row's text, or its error; `dtype` is what the model computes in, as `--dtype` calls it."""
    if row.not_finite:
        return finite.fail(row.prompt, dtype)
    if row.tokens is None:
        return refusals.refuse(row.prompt)
    return generation(row.prompt, row.tokens, row.stopped, tokenizer, row.logprobs)


def long_enough(rows: Sequence[Finished]) -> list[Finished]:
    """Those whose text says something about decoding: one that ends at once is all prefill."""
    return [row for row in rows if len(row.tokens or ()) >= selftest.TOKENS // 2]
