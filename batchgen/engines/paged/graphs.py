"""CUDA graphs of forwards: one for each of some sizes, captured when first needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Graphs:
    """Graphs that share their memory, since only one runs at a time and leaves nothing there."""

    def __init__(self, device: torch.device) -> None:
        self._made: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._device = device

    def find(self, key: Hashable, compute: Callable[[], None], pad: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """The graph of `compute`, which works on whatever its arrays hold when the graph is replayed.

        Args:
            pad: makes the arrays harmless: to capture is to compute, once.
        """
        graph = self._made.get(key)
        if graph is None:
            pad()
            compute()  # what compiles or allocates at the first call must not do so in a graph
            torch.cuda.synchronize(self._device)
            graph = self._made[key] = torch.cuda.CUDAGraph()
            # Other threads may copy meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                compute()
            self._pool = self._pool or graph.pool()
        return graph


def size(tokens: int, most: int) -> int:
    """That of the graph for so many tokens: one of some forty up to `most`, at most a quarter larger beyond 256.

    Up to a hundred tokens the time of a step is that of its weights, whatever their number.
    """
    for upper, width in ((16, 0), (256, 32), (512, 64), (1024, 128), (2048, 256)):
        if tokens <= upper:
            return min(most, -(-tokens // width) * width if width else max(2, 1 << (tokens - 1).bit_length()))
    return min(most, -(-tokens // 512) * 512)
