"""Prepares an offload: plans it, checks that it fits here, makes its folder, and measures how fast it can be read."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from batchgen.engine import Setup
from batchgen.engines.ds_zero import bandwidth, checks, extensions
from batchgen.engines.ds_zero.offload import NvmeSettings, Offload, plan_cpu, plan_nvme
from batchgen.engines.ds_zero.swap import SwapFolder
from batchgen.models.parameters import Parameters
from batchgen.tensor_parallel import process_group
from batchgen.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedOffload:
    """Weights that wait outside the GPUs, and the way that they come over in each forward."""

    plan: Offload
    weight_bytes: int  # that come over the measured way in a forward
    bandwidth: float | None  # of that way, in bytes/s; None: there is no GPU, so nothing is copied
    swap: SwapFolder | None = None  # None: the weights wait in host memory

    def log_bound(self) -> None:
        """Says how fast the weights can come, and how long a step takes at least."""
        if self.bandwidth:
            said = "the weights come at %.1f GB/s, so a step takes %.3f s or more, whatever the batch"
            logger.info(said, self.bandwidth / 1e9, self.weight_bytes / self.bandwidth)

    def close(self) -> None:
        """Removes this rank's swap files, if there are any."""
        if self.swap is not None:
            self.swap.close()


def prepare_cpu(
    weights: Parameters, world: World, device: torch.device, *, pin_memory: bool, by_layers: bool
) -> PreparedOffload:
    """Prepares for weights that wait in host memory.

    Args:
        device: where they go.
        pin_memory: copies to a GPU are to come from pinned memory.
        by_layers: `LayerGatherer` brings them, which pins memory itself; otherwise DeepSpeed does.

    Raises:
        EngineError: there is not enough memory; the message says what to do.
    """
    plan = plan_cpu(weights, world.size, pin_memory=pin_memory and torch.cuda.is_available() and not by_layers)
    checks.check_host_memory(plan, world.local_size)
    speed = bandwidth.measure_copy_bandwidth(device, pinned=pin_memory)
    return PreparedOffload(plan, (weights.shared_bytes if by_layers else weights.read_bytes) // world.size, speed)


def prepare_nvme(
    weights: Parameters, setup: Setup, folder: Path, settings: NvmeSettings, group: dist.ProcessGroup
) -> PreparedOffload:
    """Prepares for weights that wait in files below `folder`. All ranks call it at the same time.

    Args:
        group: a gloo group of all ranks.

    Raises:
        EngineError: the weights cannot wait there; the message says why and what to do.
    """
    world = setup.world
    checks.check_folder(folder)
    extensions.prepare(Path(setup.cache), logger.info)
    swap = SwapFolder(folder, setup.run, world.rank)
    if world.local_rank == 0:
        swap.clean()
    dist.barrier(group)  # no rank writes before that is done
    plan = plan_nvme(weights, world.size, swap.path, settings)
    checks.check_space(plan, folder, world.local_size)
    checks.check_host_memory(plan, world.local_size)
    checks.check_locked_memory(plan)
    swap.open()
    try:
        return PreparedOffload(plan, plan.read_bytes * world.local_size, _measure(plan, folder, world, group), swap)
    except BaseException:
        swap.close()
        raise


def _measure(plan: Offload, folder: Path, world: World, group: Any) -> float:
    """Returns the bytes/s of the slowest host, whose ranks share its disk."""
    speed = None
    if world.local_rank == 0:
        speed = bandwidth.measure_read_bandwidth(folder, block_bytes=plan.block_bytes)
    return process_group.min_over_ranks(speed, group)
