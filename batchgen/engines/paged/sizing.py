"""How many sequences and pages there is room for, and what is left of the cache after running out of memory. Pure."""

from __future__ import annotations

from collections.abc import Collection

import torch

from batchgen.engine import EngineError
from batchgen.engines.paged.pages import PAGE_SIZE

SHARE_OF_HOST = 4
"""Of a host's free memory, one in so many: other processes may have seen the same memory as free, since a cache takes
it only as it fills."""

_SLOTS_ON_CPU = 64
_MOST_SLOTS = 4096
_TYPICAL_TOKENS = 128  # of a row: what the number of slots is worked out from, not a limit
_SHRINK = 0.85  # of the cache, after a forward that has run out of memory
_MOST_SHRINKS = 8
_TOO_LARGE = (
    "out of memory in a forward, however small the cache; use --set step_tokens=1024, or fewer, or more GPUs for a "
    "model (--tp)"
)


def slots(free: int, token: int, device: torch.device) -> int:
    """Most sequences at once, when nobody has said, in `free` bytes of which a token takes `token`."""
    if device.type == "cpu":
        return _SLOTS_ON_CPU
    return max(64, min(_MOST_SLOTS, free // (token * _TYPICAL_TOKENS)) // 64 * 64)


def shrunk(pages: int, of: int) -> int:
    """Pages of the next cache, when a forward has found no memory beside one of `pages`.

    Args:
        of: those that there seemed to be room for at first.

    Raises:
        EngineError: there have been enough tries, or nothing would be left.
    """
    left = int(pages * _SHRINK)
    if left < max(1, int(of * _SHRINK**_MOST_SHRINKS)):
        raise EngineError(_TOO_LARGE)
    return left


def after(limits: Collection[int], pages: int) -> int:
    """Of `pages`, what is left after attempts that have died of a cache of so many tokens each. Raises as `shrunk`."""
    return min(pages, shrunk(min(limits) // PAGE_SIZE, pages)) if limits else pages
