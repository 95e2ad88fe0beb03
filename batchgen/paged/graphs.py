"""CUDA graphs of pure decode steps: one for each of some sizes, captured when first needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class Graphs:
    """Graphs that share their memory, since only one runs at a time and leaves nothing there.

    Args:
        most: sequences of a step.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        self._sizes = sorted({min(size, most) for size in _sizes(most)})
        self._made: dict[tuple[Hashable, ...], torch.cuda.CUDAGraph] = {}
        self._pool: tuple[int, int] | None = None
        self._device = device

    def size(self, sequences: int) -> int:
        """The smallest size that holds so many."""
        return next(size for size in self._sizes if size >= sequences)

    def find(
        self, key: tuple[Hashable, ...], compute: Callable[[], None], pad: Callable[[], None]
    ) -> torch.cuda.CUDAGraph:
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
            self._pool = self._pool or graph.pool()  # type: ignore[no-untyped-call]
        return graph


def _sizes(most: int) -> list[int]:
    """Steps that waste little: the time of a step is that of its weights up to a hundred tokens, then of its tokens."""
    sizes = [2, 4, 8, 16, *range(32, 257, 32), *range(320, 513, 64), *range(640, 1025, 128), *range(1280, most, 256)]
    return [size for size in sizes if size < most] + [max(2, most)]
