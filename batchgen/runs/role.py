"""Which process of a run this one is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from batchgen.runs.settings import Host
from batchgen.world import World, check_start, from_environment


@dataclass(frozen=True, slots=True)
class Role:
    """The part of this process in a run, decided once from the launcher's variables.

    A process is one of four: alone; the launcher of `--ranks N`, which loads no model; rank 0 of torchrun or srun,
    which speaks for the run and works too; or any other rank, which only works.
    """

    world: World
    environment: Mapping[str, str]
    ranks_to_start: int = 1

    @classmethod
    def of(cls, host: Host) -> Role:
        """Reads the launcher's variables.

        Raises:
            WorldError: they contradict each other, or srun is missing in front of the command.
        """
        world = from_environment(host.environment)
        check_start(host.environment, host.ranks)
        return cls(world, host.environment, host.ranks)

    @property
    def speaks_for_the_run(self) -> bool:
        """Whether it claims the run folder on behalf of all ranks, shows the progress, and ends the attempt."""
        return self.world.rank == 0 and self.world.attempt is None

    @property
    def launches_ranks(self) -> bool:
        """Whether it starts the ranks that do the work, and does none itself."""
        return self.ranks_to_start > 1 and self.world.size == 1

    @property
    def is_single_process(self) -> bool:
        """Whether no launcher has started other ranks beside it."""
        return self.world.size == 1

    @property
    def ranks(self) -> int:
        """How many ranks work on this start, over all hosts."""
        return max(self.world.size, self.ranks_to_start)
