"""DeepSpeed's settings of an offload, with sizes computed for the model instead of guessed.

Facts about DeepSpeed 0.19.8, from runtime/swap_tensor/partitioned_param_swapper.py:
- A buffer holds one rank's shard of one parameter, so it needs the largest parameter's elements divided by the ranks.
  The whole parameter, as is often advised, locks as many times the memory as there are ranks.
- A shard smaller than `block_size` (and 1 MiB) is never swapped: it stays in host memory. With blocks of 16 MiB and
  8 ranks that can be every shard of a model.
- Sizes are padded to 1,024 bytes a thread.
- A shard that is read takes a buffer, and gives it back when its parameter is let go, after the module that it is for
  (or, if it is tied, after the last one). What is read ahead takes buffers that are free, in the order of use
  (`__prefetch_nvme_param_partitions` in runtime/zero/partitioned_param_coordinator.py), so it has either all that the
  next module wants, or nothing but that. Hence the buffers that suffice are those of one module, of the modules around
  it, and of what is tied, whatever the sizes of prefetching; with fewer, the first module that wants more fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchgen.engine import EngineError
from batchgen.models.parameters import Parameters

# What DeepSpeed's authors use for models of this size: DeepSpeedExamples, inference/huggingface/zero_inference.
_LARGEST_BLOCK = 16 << 20  # bytes
_SMALLEST_BLOCK = 1 << 20  # bytes; DeepSpeed swaps nothing smaller (MIN_AIO_BYTES in runtime/swap_tensor/utils.py)
_QUEUE_DEPTH = 64
_THREADS = 8
_BUFFERS = 5
_ALIGNED_BYTES = 1024  # a thread's part of a file (AIO_ALIGNED_BYTES, ibid.)
_MOST_BYTES_IN_QUEUE = (1 << 31) - 1  # DeepSpeed multiplies depth and block size as C ints


@dataclass(frozen=True, slots=True)
class Offload:
    """An offload as planned: DeepSpeed's sections, and the bytes that one rank will take."""

    offload_param: dict[str, Any]  # goes into zero_optimization
    aio: dict[str, Any] | None  # goes into the configuration itself; None: nothing is read from files
    host_bytes: int  # host memory: shards that stay there, and buffers
    locked_bytes: int  # of these, what must be locked: buffers
    file_bytes: int  # swap files
    block_bytes: int  # of one read
    read_bytes: int = 0  # of the files, what a forward reads: a tied parameter is in two of them, and read from one


@dataclass(frozen=True, slots=True)
class NvmeSettings:
    """How weights are read from files.

    Raises:
        EngineError: a setting is out of range.
    """

    pin_memory: bool  # of the small shards, which stay in host memory
    whole_layers: bool = False  # all parameters of a layer are read at once
    lockable_bytes: int | None = None  # that this rank may lock; None: any amount
    block_bytes: int | None = None  # of a read; None: as `_choose_block_bytes` has it
    queue_depth: int = _QUEUE_DEPTH  # reads that wait at a time
    threads: int = _THREADS  # that read
    buffer_count: int | None = None  # None: as many as can be locked, up to 5, but at least what a forward needs

    def __post_init__(self) -> None:
        if self.threads < 1 or self.queue_depth < 1:
            raise EngineError("threads and queue depth of an NVMe offload must be 1 or more")
        if self.block_bytes is not None and self.block_bytes < 1:
            raise EngineError(f"the block size of an NVMe offload must be 1 byte or more, not {self.block_bytes}")


def plan_cpu(parameters: Parameters, ranks: int, *, pin_memory: bool) -> Offload:
    """Plans an offload of all shards to host memory.

    Args:
        parameters: as ZeRO will shard them.
        ranks: of the whole world.
        pin_memory: copies to a GPU are two to three times as fast, and the memory cannot be paged out; without a GPU it
            has no effect.
    """
    section = {"device": "cpu", "pin_memory": pin_memory}
    return Offload(section, None, parameters.shard_bytes(ranks), 0, 0, 0)


def plan_nvme(parameters: Parameters, ranks: int, folder: Path, settings: NvmeSettings) -> Offload:
    """Plans an offload of shards to files below `folder`, but for the small ones, which stay in host memory.

    Args:
        parameters: as ZeRO will shard them.
        ranks: of the whole world.
        folder: this run's own (`SwapFolder.path`); DeepSpeed writes zero_stage_3/…/rankN there.

    Raises:
        EngineError: queue depth and block size together are more than DeepSpeed can count.
    """
    threads, queue_depth = settings.threads, settings.queue_depth
    item_bytes = parameters.dtype.itemsize
    shards = [elements * item_bytes for elements in parameters.shards(ranks)]
    block = settings.block_bytes or _choose_block_bytes(shards)
    if queue_depth * block > _MOST_BYTES_IN_QUEUE:
        raise EngineError(
            f"{queue_depth} blocks of {block} bytes are 2 GiB or more, which DeepSpeed cannot count; choose a smaller "
            "queue depth or block size"
        )
    smallest = max(block, _SMALLEST_BLOCK)
    swapped = [_pad(size, threads) for size in shards if size >= smallest]
    kept = sum(size for size in shards if size < smallest)
    buffer = _pad(max(shards), threads)
    needed = parameters.max_at_once(ranks, smallest, whole_layers=settings.whole_layers)
    count = settings.buffer_count or _choose_buffer_count(max(needed, 1), buffer, settings.lockable_bytes)
    section = {"device": "nvme", "nvme_path": str(folder), "pin_memory": settings.pin_memory}
    section |= {"buffer_count": count, "buffer_size": -(-max(shards) // item_bytes)}
    aio = {
        "block_size": block,
        "queue_depth": queue_depth,
        "intra_op_parallelism": threads,
        "single_submit": False,
        "overlap_events": True,
    }
    locked = count * buffer
    both = zip(shards, parameters.by_name.values(), strict=True)
    read = sum(_pad(size, threads) for size, parameter in both if size >= smallest and not parameter.tied)
    return Offload(section, aio, kept + locked, locked, sum(swapped), block, read)


def _choose_block_bytes(shards: list[int]) -> int:
    """Returns the largest power of two, 1 to 16 MiB, with which 99 % of the bytes that can be swapped are swapped."""
    swappable = sum(size for size in shards if size >= _SMALLEST_BLOCK)
    block = _LARGEST_BLOCK
    while block > _SMALLEST_BLOCK and sum(size for size in shards if size >= block) < 0.99 * swappable:
        block //= 2
    return block


def _pad(size: int, threads: int) -> int:
    unit = _ALIGNED_BYTES * threads
    return -(-size // unit) * unit


def _choose_buffer_count(needed: int, buffer_bytes: int, lockable_bytes: int | None) -> int:
    """Returns 5 as DeepSpeed has it, more where a forward needs more at once, fewer where not all can be locked."""
    wanted = max(needed, _BUFFERS)
    if lockable_bytes is None:
        return wanted
    return max(needed, min(wanted, lockable_bytes // buffer_bytes))
