"""How fast weights can come in, measured, and how close to that a step has come."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from batchgen.engine import EngineError

_SAMPLE = 256 << 20  # bytes
_WRITE_SECONDS = 5.0  # a slow disk gets a smaller sample
_READ_SECONDS = 1.0  # the sample is read again and again for so long, at least once
_PAGE = 4096  # bytes; O_DIRECT wants sizes and places in whole blocks of the disk


def measure_read_bandwidth(folder: Path, *, block_bytes: int, threads: int = 8, sample_bytes: int = _SAMPLE) -> float:
    """Measures the bytes/s that this host reads from `folder`, by a sample of random bytes.

    The sample is written once and read past the page cache.

    `threads` reads of `block_bytes` are under way at a time, as DeepSpeed has them for one shard. Called by one process
    of the host with nothing else reading, it is what the host's ranks share. A sample this small can come from a disk's
    own cache, and a network file system may be slower once all hosts read: the figure is an upper limit.

    Raises:
        EngineError: the sample cannot be written or read.
    """
    block = min(max(block_bytes, _PAGE), sample_bytes) // _PAGE * _PAGE
    try:
        with tempfile.NamedTemporaryFile(prefix=".batchgen-", dir=folder) as file:
            blocks = _write_sample(file.name, block, max(1, sample_bytes // block))
            return _read_sample(file.name, block, blocks, threads)
    except OSError as error:
        raise EngineError(f"cannot measure how fast {folder} is: {error.strerror}") from error


def _write_sample(path: str, block: int, blocks: int) -> int:
    """Writes up to `blocks` blocks of random bytes, which no disk can compress; returns how many it has written."""
    begin = time.perf_counter()
    with _open_direct(path, os.O_WRONLY) as file, mmap.mmap(-1, block) as buffer:
        for written in range(blocks):
            if written and time.perf_counter() - begin > _WRITE_SECONDS:
                return written
            buffer[:] = os.urandom(block)
            if os.write(file, buffer) != block:
                raise OSError(0, "the disk is full")
        os.fsync(file)
    return blocks


def _read_sample(path: str, block: int, blocks: int, threads: int) -> float:
    with _open_direct(path, os.O_RDONLY) as file, ThreadPoolExecutor(threads) as pool:
        buffers = [mmap.mmap(-1, block) for _ in range(threads)]

        def read_part(first: int) -> None:
            for number in range(first, blocks, threads):
                if os.preadv(file, [buffers[first]], number * block) != block:
                    raise OSError(0, "the sample is shorter than what was written")

        passes = 0
        begin = time.perf_counter()
        while not passes or time.perf_counter() - begin < _READ_SECONDS:
            list(pool.map(read_part, range(threads)))
            passes += 1
        return passes * blocks * block / (time.perf_counter() - begin)


@contextmanager
def _open_direct(path: str, flags: int) -> Iterator[int]:
    file = os.open(path, flags | os.O_DIRECT)
    try:
        yield file
    finally:
        os.close(file)


def measure_copy_bandwidth(device: torch.device, *, pinned: bool, sample_bytes: int = _SAMPLE) -> float | None:
    """Measures the bytes/s from host memory to this GPU, over its own link.

    Returns None where `device` is no GPU, since nothing is copied then.

    Ranks that share a host's memory can each get less than this when all of them copy.
    """
    if device.type != "cuda":
        return None
    source = torch.empty(sample_bytes, dtype=torch.uint8, pin_memory=pinned).fill_(1)
    target = torch.empty_like(source, device=device)
    target.copy_(source)  # the first one also maps memory
    torch.cuda.synchronize(device)
    copies = 0
    begin = time.perf_counter()
    while not copies or time.perf_counter() - begin < _READ_SECONDS / 4:
        target.copy_(source, non_blocking=pinned)
        torch.cuda.synchronize(device)
        copies += 1
    return copies * sample_bytes / (time.perf_counter() - begin)


def compute_share_of_bound(seconds_per_step: float, weight_bytes: int, bandwidth: float) -> float:
    """Returns the part of the bandwidth that a step has used, 0 to 1: (weight_bytes / bandwidth) / seconds_per_step.

    A forward brings every weight in once, so a decode step takes at least weight_bytes / bandwidth, whatever the batch.
    Above 1: the bandwidth was measured too low, or some weights were still there from the step before.

    Args:
        seconds_per_step: of one forward.
        weight_bytes: what passes the measured path in one forward: of NVMe, the shards of all ranks of the host; of
            host memory, one rank's own.
        bandwidth: of that path, in bytes/s.

    Raises:
        ValueError: a time or a bandwidth that is not above 0.
    """
    if seconds_per_step <= 0 or bandwidth <= 0:
        raise ValueError("seconds_per_step and bandwidth must be above 0")
    return weight_bytes / bandwidth / seconds_per_step
