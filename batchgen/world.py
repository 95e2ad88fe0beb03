"""Which of several processes this one is: read from the launcher's environment variables."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from batchgen.types import UserError


class WorldError(UserError):
    """The launcher's variables contradict each other: a sentence for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class World:
    """Rank, local rank and sizes, as torch has them."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    launch: str = ""
    """The same on all ranks of one start, another at every start where the launcher gives us the means. Ranks find
    their common attempt by it."""
    job: str = ""  # Slurm's job id
    restarts: int = 0  # how often Slurm has restarted that job
    attempt: int | None = None  # the attempt that `batchgen run --ranks` made for its ranks
    master: str = ""  # HOST:PORT where the ranks meet, on rank 0's host; empty: the launcher named none

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < max(self.local_size, 1) <= self.size):
            raise WorldError(
                f"rank {self.rank} of {self.size}, local rank {self.local_rank} of {self.local_size}: "
                "the launcher's variables do not fit together"
            )


# What names one start, for each launcher. A launcher that is restarted on the same port by the same job counts up.
_LAUNCH = (
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
)


def check_start(environment: Mapping[str, str], ranks: int) -> None:
    """Refuses to be the one process of a Slurm job that was given room for several, which would stay idle.

    Raises:
        WorldError: srun is missing in front of the command.
    """
    started = "RANK" in environment or "SLURM_STEP_NUM_TASKS" in environment
    if started or "SLURM_JOB_ID" not in environment:
        return
    tasks = _number(environment, "SLURM_NTASKS") if "SLURM_NTASKS" in environment else 1
    nodes = _number(environment, "SLURM_NNODES") if "SLURM_NNODES" in environment else 1
    if nodes > 1 or (tasks > 1 and ranks == 1):
        raise WorldError(
            f"job {environment['SLURM_JOB_ID']} has {nodes} node(s) and {tasks} tasks, but this is one process of its "
            "own. Put srun in front, so that each task is a rank: srun --kill-on-bad-exit=1 batchgen run …. For one "
            "process, ask for one node and one task; it starts a rank a GPU with --gpus N"
        )


_PORTS = range(12_000, 32_000)  # below those that Linux gives to clients (net.ipv4.ip_local_port_range)


def from_environment(environment: Mapping[str, str]) -> World:
    """The world that torchrun, `deepspeed`, `batchgen run --ranks` or `srun` put this process into; alone otherwise.

    A batch script outside `srun` already has SLURM_PROCID=0 and the allocation's SLURM_NTASKS, so a program that
    trusts them there would be rank 0 of 8 and silently do an eighth. SLURM_STEP_NUM_TASKS is set by `srun` alone.

    Raises:
        WorldError: a variable is missing or not a number.
    """
    job = environment.get("SLURM_JOB_ID", "")
    # Unset at the first start, not 0.
    restarts = _number(environment, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environment else 0
    attempt = _number(environment, "BATCHGEN_ATTEMPT") if "BATCHGEN_ATTEMPT" in environment else None
    world = World(
        launch="/".join(environment.get(name, "") for name in _LAUNCH),
        job=job,
        restarts=restarts,
        attempt=attempt,
        master=_master(environment),
    )
    if "RANK" in environment and "WORLD_SIZE" in environment:
        size = _number(environment, "WORLD_SIZE")
        local_rank = _number(environment, "LOCAL_RANK")
        # torchrun's name, then DeepSpeed's; without either, as many as there must be at least.
        name = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environment), None)
        local_size = local_rank + 1 if name is None else _number(environment, name)
        rank = _number(environment, "RANK")
        return replace(world, rank=rank, local_rank=local_rank, size=size, local_size=local_size)
    if "SLURM_STEP_NUM_TASKS" in environment:
        size = _number(environment, "SLURM_STEP_NUM_TASKS")
        local_rank = _number(environment, "SLURM_LOCALID")
        local_size = _tasks_here(environment) if "SLURM_STEP_TASKS_PER_NODE" in environment else local_rank + 1
        rank = _number(environment, "SLURM_PROCID")
        return replace(world, rank=rank, local_rank=local_rank, size=size, local_size=local_size)
    return replace(world, attempt=None, master="")


def _master(environment: Mapping[str, str]) -> str:
    """Where the ranks meet: as the launcher says, or under plain `srun` on the step's first node, where task 0 is.

    Two steps of one job, and two jobs on one node, must not meet each other, so the port comes from their numbers.
    """
    host, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if "SLURM_STEP_NUM_TASKS" in environment:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        host = host or _first_node(nodes)
        job, step = (_number(environment, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        port = port or str(_PORTS[(31 * job + step) % len(_PORTS)])
    return f"{host}:{port}" if host and port else ""


def free_port() -> int:
    """A port of this host that nobody has, and that Linux gives to no client meanwhile.

    Raises:
        WorldError: there is none.
    """
    first = time.monotonic_ns() // 1000  # two that start at once begin to look in two places
    for number in range(len(_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", _PORTS[(first + number) % len(_PORTS)]))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise WorldError(f"no port from {_PORTS[0]} to {_PORTS[-1]} is free here, where ranks could meet")


def _first_node(nodes: str) -> str:
    """The first name of Slurm's compressed list: "gpu[07-09,12],login" begins with gpu07."""
    first = re.match(r"([^,\[]*)(?:\[([^\]]*)\])?([^,\[]*)", nodes)
    assert first is not None, "every part of the pattern may be empty"
    prefix, numbers, suffix = first.groups()
    return prefix + re.split(r"[-,]", numbers or "")[0] + suffix


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None:
        raise WorldError(
            f"{name} is not set although this process was started as one of several; start it with torchrun or srun"
        )
    try:
        return int(text)
    except ValueError:
        raise WorldError(f"{name} is {text!r}, not a number") from None


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks on this node, from Slurm's compressed list: "4(x2),3" means 4, 4, 3."""
    text = environment["SLURM_STEP_TASKS_PER_NODE"]
    node = _number(environment, "SLURM_NODEID") if "SLURM_NODEID" in environment else 0
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise WorldError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, not a list like 4(x2),3")
        node -= int(match[2] or 1)
        if node < 0:
            return int(match[1])
    raise WorldError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}: it does not say how many tasks this node has")
