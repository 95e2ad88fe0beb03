"""How the kernels of attention are compiled; `benchmarks/attention.py` measures candidates. Pure."""

from __future__ import annotations

from typing import NamedTuple


class Settings(NamedTuple):
    """How a kernel is compiled."""

    keys: int  # tokens whose keys a program looks at at once
    num_warps: int
    num_stages: int


Table = dict[int, Settings]
"""By the larger one of the sizes of keys and values, up to which the settings are meant."""

# Those up to 128 were measured (benchmarks/README.md); above, they are the ones whose registers the compiler need not
# spill.
DECODE: Table = {128: Settings(64, 2, 2), 192: Settings(64, 2, 2), 256: Settings(32, 4, 2)}
PREFILL: Table = {128: Settings(64, 4, 3), 192: Settings(64, 8, 3), 256: Settings(32, 8, 3)}

# Over a cache of 8 bits none is measured: these are such that no registers are spilled.
ROUNDED_DECODE: Table = {128: Settings(64, 2, 2), 192: Settings(32, 2, 2), 256: Settings(32, 4, 2)}
ROUNDED_PREFILL: Table = {128: Settings(64, 4, 3), 192: Settings(32, 8, 3), 256: Settings(32, 8, 3)}


def choose(kernel: str, is_rounded: bool) -> Table:
    """Returns the settings of a kernel, decode or prefill, over a cache of 8 bits or of the model's numbers."""
    if kernel == "decode":
        return ROUNDED_DECODE if is_rounded else DECODE
    return ROUNDED_PREFILL if is_rounded else PREFILL
