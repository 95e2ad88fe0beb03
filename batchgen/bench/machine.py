"""What this machine can do at most, measured on the spot: the floor under the time of a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from batchgen.device import cores
from batchgen.models.footprint import CacheFormat, Execution, Footprint
from batchgen.models.parameters import Parameters
from batchgen.planning.speed import Model

_TIMES = 5  # the best of this many


@dataclass(frozen=True, slots=True)
class Machine:
    """One device: a GPU, or all cores that this process may use."""

    name: str
    bandwidth: float  # bytes/s that a copy in its memory reads and writes
    arithmetic: float  # operations/s of a large matrix product in the model's type, an addition and a product as two


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measures `device` in about a second."""
    gpu = device.type == "cuda"
    source = torch.ones((1 << 30 if gpu else 1 << 27) // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source), device)
    size = 8192 if gpu else 1024
    left, right = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    multiplied = _best(lambda: left @ right, device)
    name = torch.cuda.get_device_name(device) if gpu else f"{cores()} CPU cores"
    return Machine(name, 2 * source.numel() * dtype.itemsize / copied, 2 * size**3 / multiplied)


def _best(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of several calls, after one that does not count."""
    times = []
    for _ in range(_TIMES + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds that steps of a model take at least on a machine: the larger of bytes by bandwidth and operations by
    arithmetic. Weights are read once a step, the cache of each row once a token of its own. Of a mixture of experts,
    those are read that any token of the step is expected to be sent to; of a layer with a window, no more than that."""

    machine: Machine
    weights: Parameters
    footprint: Footprint
    operations: int  # a token: two a weight that it is computed with, the embedding's aside
    size: str  # of the model, in words
    cache: CacheFormat | None = None  # how the KV cache is kept; None: in the type that is computed with

    @classmethod
    def of(
        cls, config: Any, dtype: torch.dtype, machine: Machine, stored: str = "", cache: CacheFormat | None = None
    ) -> Floor:
        """The floor for the model with this Transformers config.

        Args:
            stored: what its weights are rounded to, as `planning.speed.Model` takes it. The arithmetic is that of
                `dtype` all the same.
        """
        model = Model.of(config, dtype, stored, cache)
        whole = model.whole
        text = config.get_text_config()
        # An embedding is looked up; where it is the output matrix too, it is multiplied with once.
        looked_up = 0 if whole.tied else text.vocab_size * text.hidden_size
        return cls(machine, model.weights, model.footprint, 2 * (whole.active - looked_up), str(model), cache)

    def prefill(self, rows: int, tokens: int) -> float:
        """One forward over `rows` prompts of `tokens` tokens."""
        return self._step(rows * tokens, 0.0)

    def decode(self, rows: int, context: float, steps: int) -> float:
        """`steps` steps of `rows` rows, with `context` tokens before the first of them."""
        execution = Execution(self.weights.dtype.itemsize, cache=self.cache)
        caches = (self.footprint.cache_bytes(round(context) + step, execution) for step in range(steps))
        return sum(self._step(rows, rows * cache) for cache in caches)

    def _step(self, tokens: float, cache: float) -> float:
        size = self.weights.step_bytes(tokens) + cache
        return max(size / self.machine.bandwidth, tokens * self.operations / self.machine.arithmetic)
