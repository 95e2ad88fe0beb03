"""How many sequences and pages there is room for, and what is left of the cache after running out of memory. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from batchgen.engine import EngineError, OutOfStep
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.models import footprint

SHARE_OF_HOST = 4
"""Of a host's free memory the cache takes at most one in this many parts: other processes may have seen the same memory
as free, since a cache takes it only as it fills."""

NO_ROOM = (
    "beside the model there is no room for a cache; use a smaller --dtype, fewer rows (--batch-size), more GPUs for a "
    "model (--tp), or --engine accelerate, which can put weights elsewhere"
)
_LONGEST = 1 << 16  # tokens of a sequence, of a model that sets no limit
_SLOTS_ON_CPU = 64
_MOST_SLOTS = 4096
_TYPICAL_TOKENS = 128  # of a row: what the number of slots is worked out from, not a limit
_SHRINK = 0.85  # of the cache, after a forward that has run out of memory
_MOST_SHRINKS = 8
_STEP_OPERATIONS = 20e12  # of a step with prefill chunks: some 30 ms of an H100, which hides the work of the CPU
_TOO_LARGE = (
    "out of memory in a forward, however small the cache; use --set step_tokens=1024, or fewer, or more GPUs for a "
    "model (--tp)"
)


@dataclass(frozen=True, slots=True)
class CacheLesson:
    """What an attempt teaches the next one when a step of several ranks has found no memory: a cache of this many pages
    leaves too little beside it.

    A run folder keeps such lessons as "batches of this length, in tokens, may have this many rows". A cache has no
    rows, so its size in tokens stands for the length, and one row is named. Only this class writes and
    reads that form, which is the one that earlier versions have left in run folders.
    """

    pages: int

    def to_error(self) -> OutOfStep:
        """What ends the attempt, and carries the lesson to the run folder."""
        error = OutOfStep("out of memory in a step that several ranks take together")
        error.length, error.rows = self.pages * PAGE_SIZE, 2
        return error

    @classmethod
    def read(cls, limits: Mapping[int, int]) -> list[CacheLesson]:
        """The lessons of earlier attempts, from `Setup.limits`."""
        return [cls(length // PAGE_SIZE) for length in limits]


def choose_slots(free: int, token_bytes: int, device: torch.device) -> int:
    """Most sequences at once when the user has not said, in `free` bytes of which a token takes `token_bytes`."""
    if device.type == "cpu":
        return _SLOTS_ON_CPU
    return max(64, min(_MOST_SLOTS, free // (token_bytes * _TYPICAL_TOKENS)) // 64 * 64)


def choose_sequence_tokens(tokenizer: Any, cache_tokens: int | None) -> int:
    """Most tokens of a sequence of the model of this `HfTokenizer`.

    Args:
        cache_tokens: that the cache holds, if the user has said so.
    """
    # What layers with a window keep of a sequence may be less than all of its tokens.
    has_windows = any(layer.window for layer in footprint.list_layer_caches(tokenizer.config))
    return min(tokenizer.context or _LONGEST, _LONGEST if has_windows else cache_tokens or _LONGEST)


def choose_step_tokens(parameters: int) -> int:
    """Most tokens of a step with prefill chunks when the user has not said; `parameters` is what a rank holds."""
    return min(8192, max(2048, int(_STEP_OPERATIONS / 2 / parameters)))


def shrink(pages: int, first_pages: int) -> int:
    """Pages of the next cache, when a forward has found no memory beside one of `pages`.

    Args:
        first_pages: those that there seemed to be room for at first.

    Raises:
        EngineError: there have been enough tries, or nothing would be left.
    """
    smaller = int(pages * _SHRINK)
    if smaller < max(1, int(first_pages * _SHRINK**_MOST_SHRINKS)):
        raise EngineError(_TOO_LARGE)
    return smaller


def shrink_after(lessons: list[CacheLesson], pages: int) -> int:
    """Of `pages`, what is left after attempts that have taught these lessons. Raises as `shrink`."""
    return min(pages, shrink(min(lesson.pages for lesson in lessons), pages)) if lessons else pages
