"""The process group of engines whose ranks call together."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from batchgen.engine import Died, EngineError
from batchgen.models import loading
from batchgen.world import World, free_port


def collective_timeout(patience: float) -> timedelta:
    """Returns the timeout of collectives: twice the patience, so that the watchdog, which can name a rank, is first."""
    return timedelta(seconds=2 * patience)


def min_over_ranks(figure: float | None, group: Any) -> float:
    """Returns the smallest of the figures of all ranks of a gloo group; a rank that has none gives None."""
    smallest = torch.tensor([float("inf") if figure is None else figure], dtype=torch.float64)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=group)
    return float(smallest.item())


def join(world: World, patience: float) -> torch.device:
    """Makes the process group of all ranks, NCCL's or gloo's; returns this rank's device.

    Args:
        patience: seconds without a sign of another rank, after which the watchdog takes it for dead.

    Raises:
        EngineError: the launcher named no place to meet, or another program has it.
        Died: not all ranks came, as if one of them was frozen or killed.
    """
    gpu = torch.cuda.is_available()
    # DeepSpeed calls what torch 2.13 has given another name.
    warnings.filterwarnings("ignore", r"`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    device = torch.device("cuda", loading.gpu_of(world)) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if world.size > 1 and not world.master:
        raise EngineError(
            f"the launcher of these {world.size} ranks does not say where they meet: set MASTER_ADDR to the host of "
            "rank 0, and MASTER_PORT to a free port there"
        )
    alone = world.size == 1
    master = f"127.0.0.1:{free_port()}" if alone else world.master
    host, _, port = master.rpartition(":")
    # For DeepSpeed, which looks for MPI where one of them is missing, and for torch.
    variables = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
    for name, value in {**variables, "MASTER_ADDR": host, "MASTER_PORT": port}.items():
        os.environ.setdefault(name, str(value))
    # Not for several: torchrun's agent keeps the store on that port, and torch sees from the variables that it does.
    place: dict[str, Any] = {"init_method": f"tcp://{master}", "rank": 0, "world_size": 1} if alone else {}
    try:
        dist.init_process_group("nccl" if gpu else "gloo", timeout=collective_timeout(patience), **place)
    except (ValueError, RuntimeError) as error:
        said = f"rank {world.rank} of {world.size} cannot join the other ranks at {master}: {error}"
        taken = "address already in use" in str(error)
        if isinstance(error, dist.DistError) and not taken:
            raise Died(f"{said}. Those of them that came have not met all the others in time") from error
        if taken and (alone or world.attempt is not None):
            raise Died(f"{said}. Another process was faster; the same command takes another port") from error
        raise EngineError(f"{said}. If another job has that port, MASTER_PORT names another one") from error
    disable_shared_memory_all_reduce()
    return device


def leave() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abandon() -> None:
    """Ends what this rank's GPU does together with others, if it does anything.

    NCCL's kernels wait for a rank that is gone until they are aborted, and with them whoever synchronises with the GPU,
    if only to free its memory.
    """
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()


def disable_shared_memory_all_reduce() -> None:
    """Keeps DeepSpeed from its all-reduce through shared memory on CPUs.

    It would be built at first use, which takes minutes, leaves 69 MB of each rank in /dev/shm, and knows nothing of
    groups, nor of a second node.
    """
    import deepspeed.comm  # noqa: F401

    # Warning: a function of DeepSpeed is replaced for the whole process. `build_shm_op` makes the all-reduce through
    # shared memory, and DeepSpeed takes None for "not on this machine". If a new version calls it by another name,
    # DeepSpeed builds the operation again: minutes at the first use, and files that stay in /dev/shm.
    # By its full name: as an attribute of deepspeed.comm, `torch` is PyTorch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


@contextmanager
def fake_group(rank: int, size: int) -> Iterator[None]:
    """Makes this process rank `rank` of `size`, inside `with`, in a group whose collectives do nothing."""
    import deepspeed.comm
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend, too

    disable_shared_memory_all_reduce()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
        leave()
