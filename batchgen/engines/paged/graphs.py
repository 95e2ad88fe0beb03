"""CUDA graphs of forwards: one for each of some sizes, captured when first needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from batchgen.engine import EngineError


class Graphs:
    """Graphs that share their memory, since only one runs at a time and leaves nothing there."""

    def __init__(self, device: torch.device) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._device = device

    def find_or_capture(
        self, key: Hashable, compute: Callable[[], None], pad: Callable[[], object]
    ) -> torch.cuda.CUDAGraph:
        """The graph of `compute`, which works on whatever its arrays hold when the graph is replayed.

        Args:
            pad: makes the arrays those of a harmless step: to capture is to compute, once.
        """
        graph = self._graphs.get(key)
        if graph is None:
            pad()
            compute()  # what compiles or allocates at the first call must not do so in a graph
            torch.cuda.synchronize(self._device)
            graph = self._graphs[key] = torch.cuda.CUDAGraph()
            # Other threads may copy meanwhile.
            with _explain_waiting(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                compute()
            self._pool = self._pool or graph.pool()
        return graph


@contextmanager
def _explain_waiting() -> Iterator[None]:
    """Words the error of a forward that waits for the GPU, as a loop over experts does which asks how many tokens each
    has: such a forward cannot be captured."""
    try:
        yield
    except RuntimeError as error:
        if "capturing" not in str(error):
            raise
        raise EngineError(
            "--engine paged cannot run this model on a GPU: its forward waits for the GPU, and cannot be captured in a "
            "CUDA graph; use --engine accelerate"
        ) from error


def choose_graph_size(tokens: int, largest: int) -> int:
    """The tokens of the graph for a step of this many: one of some forty sizes up to `largest`, above 256 at most a
    quarter larger than the step.

    Up to a hundred tokens the time of a step is that of reading the weights, whatever their number.
    """
    for upper, width in ((16, 0), (256, 32), (512, 64), (1024, 128), (2048, 256)):
        if tokens <= upper:
            return min(largest, -(-tokens // width) * width if width else max(2, 1 << (tokens - 1).bit_length()))
    return min(largest, -(-tokens // 512) * 512)
