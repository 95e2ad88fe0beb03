"""How fast this machine's processor multiplies, measured: what `--dtype auto` takes without a GPU, and a forecast.

No list of processors says it. Without instructions for bfloat16 its products take two to six times as long as those of
float32, by the width of the registers; with them, half as long; and libraries may be told to leave instructions out.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch

_ROWS = 16  # of a decode step
_DEPTH, _COLUMNS = 576, 1536
_MATRICES = 4  # taken in turn, so that they are read from memory, or as much of them as a step's
_LEAST_ROUNDS, _SECONDS = 5, 0.05


@dataclass(frozen=True, slots=True)
class Products:
    """What products reach on one core."""

    operations: float  # operations/s of a product with the rows of a decode step
    bandwidth: float  # bytes/s of weights, in a product with one row


def is_fast_in(dtype: torch.dtype) -> bool:
    """Whether products of this type take no longer than those of float32."""
    return measure_products(dtype).operations >= measure_products(torch.float32).operations


@lru_cache
def measure_products(dtype: torch.dtype) -> Products:
    """The best of some rounds of products of this type, in some 50 ms.

    On one core: several wait for each other, and where others work too, that is what would be measured.
    """
    # The threads that compute for a thread end with it, and are not in the way of those that compute for an engine.
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(_measure, dtype).result()


def _measure(dtype: torch.dtype) -> Products:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            weights = [torch.ones(_COLUMNS, _DEPTH, dtype=dtype) for _ in range(_MATRICES)]
            many, one = (torch.ones(rows, _DEPTH, dtype=dtype) for rows in (_ROWS, 1))
            for rows in (many, one):  # the library prepares its kernels at the first call
                _time(rows, weights[:1])
            seconds: list[tuple[float, float]] = []
            begun = time.perf_counter()
            while len(seconds) < _LEAST_ROUNDS or time.perf_counter() - begun < _SECONDS:
                seconds.append((_time(many, weights), _time(one, weights)))
    finally:
        torch.set_num_threads(threads)
    step, row = (min(times) for times in zip(*seconds, strict=True))
    size = _DEPTH * _COLUMNS * _MATRICES
    return Products(2 * _ROWS * size / step, size * dtype.itemsize / row)


def _time(rows: torch.Tensor, weights: list[torch.Tensor]) -> float:
    begun = time.perf_counter()
    for weight in weights:
        torch.nn.functional.linear(rows, weight)
    return time.perf_counter() - begun
