"""Ranks in groups of a few that share a model, side by side in the world; what a group's ranks tell each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from batchgen.engine import EngineError, Peers, Stream
from batchgen.tensor_parallel import process_group
from batchgen.world import World

_FOR_EVER = timedelta(days=365)  # for ranks that load, that wait in `told`, and at the end for groups with more to do
_MESSAGE = 1 << 13  # numbers that go in one message, the first of them their count: a step of two thousand rows
_LONGEST_SLEEP = 0.1  # s, between two looks at whether the others have come


def ranks_of_group(world: World, size: int | None) -> range:
    """Returns the ranks that share a model with this one: `size` neighbours; None: all ranks of the world.

    Raises:
        EngineError: the world does not divide, or a group would lie across nodes without need.
    """
    size = world.size if size is None else size
    if size < 1:
        raise EngineError(f"tp={size}: must be 1 or more")
    if world.size % size:
        fits = list_divisors(world.size)
        raise EngineError(
            f"tp={size} does not divide the {world.size} rank{'s' if world.size > 1 else ''} of this run: start a "
            f"multiple of {size} (--gpus {size}, or as many tasks under srun or torchrun), or choose a tp of {fits}"
        )
    if world.local_size % size and size % world.local_size:
        raise EngineError(
            f"tp={size} with {world.local_size} ranks a node: a group would lie across nodes, where every layer waits "
            f"for the network. Start a multiple of {size} ranks a node, or let tp be a divisor of {world.local_size}"
        )
    first = world.rank // size * size
    return range(first, first + size)


def stream_of(world: World, size: int | None) -> Stream:
    """Returns the stream of this rank: each group is one, and its first rank writes. Raises as `ranks_of_group`."""
    group = ranks_of_group(world, size)
    return Stream(group.start // len(group), world.size // len(group), writes=world.rank == group.start)


def list_divisors(number: int) -> str:
    """Returns all divisors of `number`, in words."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


class Group(Peers):
    """The tensor-parallel group of this rank: its process groups, and what its ranks agree on."""

    def __init__(self, world: World, ranks: range, device: torch.device, timeout: timedelta) -> None:
        """Makes the process groups. Every rank of the world makes its `Group` at the same time.

        Args:
            ranks: the ranks of the world that share a model with this one.
            timeout: a rank that has waited for another one for so long gives up.
        """
        self.ranks, self.device = ranks, device
        self._place = world.rank - ranks.start
        size = len(ranks)
        firsts = range(0, world.size, size)
        # Each rank takes part in the making of all groups: torch counts them.
        backend = "nccl" if device.type == "cuda" else "gloo"
        model_groups = [dist.new_group([*range(first, first + size)], timeout, backend) for first in firsts]
        # NCCL would make the CPU wait for the GPU at every step; these are for the CPUs alone.
        flag_groups = [dist.new_group([*range(first, first + size)], timeout, "gloo") for first in firsts]
        message_groups = [dist.new_group([*range(first, first + size)], _FOR_EVER, "gloo") for first in firsts]
        loading_groups = [dist.new_group([*range(first, first + size)], _FOR_EVER, "gloo") for first in firsts]
        self.model: dist.ProcessGroup = model_groups[world.rank // size]
        self._flags: dist.ProcessGroup = flag_groups[world.rank // size]
        self._messages: dist.ProcessGroup = message_groups[world.rank // size]
        self._loading: dist.ProcessGroup = loading_groups[world.rank // size]
        self._message = torch.zeros(_MESSAGE, dtype=torch.int64)
        self._everyone = dist.new_group(backend="gloo", timeout=_FOR_EVER)

    @classmethod
    def meet(cls, world: World, ranks: range, patience: float) -> Group:
        """Joins the other ranks of the world, and makes the group of `ranks`, which share a model.

        Args:
            patience: in seconds, as in `process_group.join`.
        """
        return cls(world, ranks, process_group.join(world, patience), process_group.collective_timeout(patience))

    @property
    def count(self) -> int:
        return len(self.ranks)

    @property
    def place(self) -> int:
        return self._place

    def any_rank(self, flag: bool) -> bool:
        if len(self.ranks) == 1:
            return flag
        return bool(self._reduce(int(flag), dist.ReduceOp.MAX))

    def least(self, number: int) -> int:
        return number if len(self.ranks) == 1 else self._reduce(number, dist.ReduceOp.MIN)

    def tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        if len(self.ranks) > 1:
            dist.broadcast(tokens, src=self.ranks[0], group=self.model)
        return tokens

    def tell(self, numbers: NDArray[np.int64]) -> None:
        head, rest = numbers[: _MESSAGE - 1], numbers[_MESSAGE - 1 :]
        message = self._message.numpy()
        message[0], message[1 : 1 + len(head)] = len(numbers), head
        dist.broadcast(self._message, src=self.ranks[0], group=self._messages)
        if len(rest):
            dist.broadcast(torch.from_numpy(rest.copy()), src=self.ranks[0], group=self._messages)

    def told(self) -> NDArray[np.int64]:
        dist.broadcast(self._message, src=self.ranks[0], group=self._messages)
        count, head = int(self._message[0]), self._message.numpy()[1:].copy()
        if count <= len(head):
            return head[:count]
        rest = torch.empty(count - len(head), dtype=torch.int64)
        dist.broadcast(rest, src=self.ranks[0], group=self._messages)
        return np.concatenate([head, rest.numpy()])

    def await_loaded(self, stop: Callable[[], bool]) -> None:
        """Waits until all ranks of the group have come here, however long that takes: from a cold disk one may read for
        an hour longer than another from its page cache.

        Returns early if `stop()` is true, or another rank is gone.
        """
        if len(self.ranks) > 1:
            _meet(self._loading, stop)

    def await_others(self, stop: Callable[[], bool]) -> None:
        """The same of all groups: the first rank of the world keeps what the others meet by."""
        _meet(self._everyone, stop)

    def _reduce(self, number: int, operation: dist.ReduceOp.RedOpType) -> int:
        tensor = torch.tensor([number])
        dist.all_reduce(tensor, op=operation, group=self._flags)
        return int(tensor.item())


def _meet(group: dist.ProcessGroup, stop: Callable[[], bool]) -> None:
    arrived = dist.barrier(group=group, async_op=True)
    sleep = 0.001
    while arrived is not None and not arrived.is_completed() and not stop():
        time.sleep(sleep)
        sleep = min(2 * sleep, _LONGEST_SLEEP)
