"""The process group of engines whose ranks call together."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from batchgen import loading
from batchgen.engine import EngineError
from batchgen.world import World


def join(world: World, timeout: timedelta) -> torch.device:
    """Makes the process group of all ranks, NCCL's or gloo's; gives this rank's device.

    Raises:
        EngineError: the launcher named no place to meet, or no meeting came about.
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", loading.gpu_of(world)) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if world.size > 1 and not world.master:
        raise EngineError(
            f"the launcher of these {world.size} ranks does not say where they meet: set MASTER_ADDR to the host of "
            "rank 0, and MASTER_PORT to a free port there"
        )
    alone = world.size == 1
    master = f"127.0.0.1:{_free_port()}" if alone else world.master
    host, _, port = master.rpartition(":")
    # For DeepSpeed, which looks for MPI where one of them is missing, and for torch.
    variables = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
    for name, value in {**variables, "MASTER_ADDR": host, "MASTER_PORT": port}.items():
        os.environ.setdefault(name, str(value))
    # Not for several: torchrun's agent keeps the store on that port, and torch sees from the variables that it does.
    place: dict[str, Any] = {"init_method": f"tcp://{master}", "rank": 0, "world_size": 1} if alone else {}
    try:
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timeout, **place)
    except (ValueError, RuntimeError) as error:
        raise EngineError(
            f"rank {world.rank} of {world.size} cannot join the other ranks at {master}: {error}. If another job has "
            "that port, MASTER_PORT names another one"
        ) from error
    return device


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
