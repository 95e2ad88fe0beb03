"""The GPUs and the CPU that this process computes on: their memory, their cores, and how fast a CPU multiplies.

No list of processors says how fast one is. Without instructions for bfloat16 its products take two to six times as long
as those of float32, by the width of the registers; with them, half as long; and libraries may be told to leave
instructions out. So it is measured: what `--dtype auto` takes without a GPU, and a forecast.
"""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

_OUT_OF_MEMORY = (
    "out of memory",  # CUDA
    "can't allocate memory",  # torch's CPU allocator
    "cannot allocate memory",  # errno 12 in other words
    "bad_alloc",  # C++, through a torch error
    "alloc_failed",  # cuBLAS's workspace
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed, on a GPU or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def release() -> None:
    """Gives back what nobody needs: modules refer to each other, and their tensors would outlive an engine."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def devices() -> list[str]:
    """The name of each GPU that this process holds memory of; none: it computes on the CPU."""
    held = [number for number in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(number)]
    return [torch.cuda.get_device_name(number) for number in held]


def free_bytes(devices: Sequence[torch.device], local_size: int) -> int:
    """Memory that a batch can take: of all GPUs in `devices` what the fullest has, times their number, because each
    holds its share of the layers; without a GPU, this rank's share of the host's."""
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        return host_free_bytes() // max(local_size, 1)
    return len(gpus) * min(_gpu_free_bytes(device) for device in gpus)


def _gpu_free_bytes(device: torch.device) -> int:
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def host_free_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    membership: Path = Path("/proc/self/cgroup"),
    cgroups: Path = Path("/sys/fs/cgroup"),
) -> int:
    """Memory of this host that is available, or what the job's cgroup (version 2) leaves, whichever is less.

    Beyond a cgroup's limit there is no error to learn from: the kernel kills the process.
    """
    available = _meminfo(meminfo, "MemAvailable")
    for limit, used in _cgroup_limits(membership, cgroups):
        available = min(available, limit - used)
    return max(available, 0)


def host_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    membership: Path = Path("/proc/self/cgroup"),
    cgroups: Path = Path("/sys/fs/cgroup"),
) -> int:
    """Memory that this host has, or that the job's cgroup (version 2) may have, whichever is less; used or not."""
    return min([_meminfo(meminfo, "MemTotal"), *(limit for limit, _ in _cgroup_limits(membership, cgroups))])


def _meminfo(meminfo: Path, name: str) -> int:
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def _cgroup_limits(membership: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """The limit and the use in bytes of each cgroup that this process is in."""
    for line in membership.read_text().splitlines() if membership.exists() else []:
        number, _, path = line.split(":", 2)
        own = cgroups / path.lstrip("/")
        for folder in (own, *own.parents) if number == "0" else ():
            limit_file, used = folder / "memory.max", folder / "memory.current"
            if limit_file.exists() and used.exists() and (limit := limit_file.read_text().strip()) != "max":
                yield int(limit), int(used.read_text()) - _page_cache(folder / "memory.stat")


def _page_cache(statistics: Path) -> int:
    """Bytes of files that were read and can be forgotten at once, which a cgroup counts as used."""
    lines = statistics.read_text().splitlines() if statistics.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def can_reserve(size: int, device: torch.device) -> bool:
    """Whether this many bytes of the device are there now; they are given back at once."""
    try:
        torch.empty(size, dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def take_peak_bytes(devices: Sequence[torch.device]) -> int:
    """The most memory in use since the last call, on the fullest GPU; without a GPU, of the process over its life."""
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
    peak = max(torch.cuda.max_memory_allocated(device) for device in gpus)
    for device in gpus:
        torch.cuda.reset_peak_memory_stats(device)
    return peak


def cores() -> int:
    """Processor cores that this process may use; Slurm and containers give fewer than the machine has."""
    return len(os.sched_getaffinity(0))


_ROWS = 16  # of a decode step
_DEPTH, _COLUMNS = 576, 1536
_MATRICES = 4  # taken in turn, so that they are read from memory, or as much of them as a step's
_LEAST_ROUNDS, _SECONDS = 5, 0.05


@dataclass(frozen=True, slots=True)
class MatmulSpeed:
    """How fast one core multiplies matrices."""

    operations: float  # operations/s of a product with the rows of a decode step
    bandwidth: float  # bytes/s of weights, in a product with one row


def is_fast_in(dtype: torch.dtype) -> bool:
    """Whether products of this type take no longer than those of float32."""
    return measure_matmul(dtype).operations >= measure_matmul(torch.float32).operations


@lru_cache
def measure_matmul(dtype: torch.dtype) -> MatmulSpeed:
    """Measures matrix products of this type for about 50 ms, and gives the best round.

    It uses one core: several cores wait for each other, and beside other work that wait is what would be measured.
    """
    # The threads that compute for a thread end with it, and are not in the way of those that compute for an engine.
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(_measure, dtype).result()


@contextmanager
def use_one_core() -> Iterator[None]:
    """Has torch compute on one core inside. On many, small tensors make threads wait for each other, and far longer
    where other processes compute on the same cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measure(dtype: torch.dtype) -> MatmulSpeed:
    with use_one_core(), torch.inference_mode():
        weights = [torch.ones(_COLUMNS, _DEPTH, dtype=dtype) for _ in range(_MATRICES)]
        many, single = (torch.ones(rows, _DEPTH, dtype=dtype) for rows in (_ROWS, 1))
        for rows in (many, single):  # the library prepares its kernels at the first call
            _time(rows, weights[:1])
        seconds: list[tuple[float, float]] = []
        start = time.perf_counter()
        while len(seconds) < _LEAST_ROUNDS or time.perf_counter() - start < _SECONDS:
            seconds.append((_time(many, weights), _time(single, weights)))
    step, row = (min(times) for times in zip(*seconds, strict=True))
    size = _DEPTH * _COLUMNS * _MATRICES
    return MatmulSpeed(2 * _ROWS * size / step, size * dtype.itemsize / row)


def _time(rows: torch.Tensor, weights: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    for weight in weights:
        torch.nn.functional.linear(rows, weight)
    return time.perf_counter() - start
