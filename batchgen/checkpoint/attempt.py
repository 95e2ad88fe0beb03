"""One start of a run: its claim on the run folder, and the heartbeats of its ranks.

    attempts/00001.json           the claim, made exclusively: host, process, Slurm job, world; at the end how it ended
    attempts/00001-00000.json     rank 0's heartbeat, rewritten every few seconds

A claim is for the whole run, or for one shard of it: the tasks of a job array have a claim each. It is live while its
process exists on this host or, from another host, while a heartbeat still moves. No file locks: NFS and Lustre have
them only sometimes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchgen.checkpoint.files import CheckpointError, Damaged, cannot_write, make_exclusive, read_json, to_json
from batchgen.checkpoint.folder import RunFolder
from batchgen.checkpoint.heartbeats import has_numbers, read_heartbeats
from batchgen.checkpoint.process import exists, myself
from batchgen.files import write_atomic
from batchgen.types import WHOLE, Shard
from batchgen.world import World

logger = logging.getLogger(__name__)

# A heartbeat that has not moved for this many intervals is that of a dead process. NFS may show a file of another host
# up to 60 s late (its default acregmax, acdirmax), so with the default interval of 5 s the limit is 90 s.
MISSED_HEARTBEATS = 18
HEARTBEAT_SECONDS = 5.0

# The ranks of one start may come minutes apart: a slow node imports torch from a slow file system.
JOIN_SECONDS = 600.0

FINAL = ("finished", "stopped", "failed")  # states of a rank after which it does nothing any more


@dataclass(frozen=True, slots=True)
class Attempt:
    """A start that holds, or held, the run folder."""

    folder: RunFolder
    number: int
    claim: Mapping[str, Any] = field(repr=False)

    @property
    def path(self) -> Path:
        """The claim's file."""
        return self.folder.attempts / f"{self.number:05d}.json"

    @property
    def ended(self) -> str | None:
        """How the attempt ended, in its own words; None while it works, or if it died."""
        value = self.claim.get("ended")
        return None if value is None else str(value)

    @property
    def shard(self) -> Shard:
        """The rows it is for."""
        return Shard.parse(str(self.claim.get("shard", WHOLE)))

    @property
    def limit(self) -> float:
        """Seconds without a heartbeat after which another host may take the attempt for dead."""
        return MISSED_HEARTBEATS * float(self.claim.get("heartbeat_seconds", HEARTBEAT_SECONDS))

    @property
    def where(self) -> str:
        """Host and process, for a person."""
        if not self.claim:
            return f"attempt {self.number}, whose claim is damaged,"
        return f"attempt {self.number}, process {self.claim.get('pid')} on {self.claim.get('host')}"

    def heartbeats(self) -> dict[int, dict[str, Any]]:
        """The last heartbeat of every rank."""
        return read_heartbeats(self.folder.attempts.glob(f"{self.number:05d}-*.json"))

    def end(self, how: str) -> None:
        """Records that the attempt is over. Only its own process calls this."""
        write_atomic(self.path, to_json({**self.claim, "ended": how, "ended_at": time.time()}))

    def seems_live(self, world: World) -> bool | None:
        """Whether the attempt still works; None if only watching it can tell, its process being on another host."""
        seen = self.is_here()
        if self.ended is not None or seen is False:
            return False
        if world.job and self.claim.get("job") == world.job and int(self.claim.get("restarts", 0)) < world.restarts:
            return seen or False  # Slurm has restarted the job: only a process that is seen on this host still works
        return seen

    def is_here(self) -> bool | None:
        """Whether one of its processes exists, as far as this host can tell; None if one works where we cannot look."""
        heartbeats = self.heartbeats().values()
        working = [heartbeat for heartbeat in heartbeats if heartbeat.get("state") not in FINAL]
        # If the claim is damaged, only heartbeats show that the attempt exists; a rank that has ended may be merging.
        processes = (self.claim, *working) if self.claim or not heartbeats else heartbeats
        seen = [exists(process) for process in processes]
        if True in seen:
            return True
        return None if None in seen else False


def attempts(folder: RunFolder) -> list[Attempt]:
    """All attempts so far, oldest first."""
    return [read_attempt(folder, number) for number in sorted(_numbers(folder))]


def _numbers(folder: RunFolder) -> set[int]:
    return {int(path.stem) for path in folder.attempts.glob("*.json") if path.stem.isdigit()}


def _has_files(folder: RunFolder, number: int) -> bool:
    """Whether an attempt `number` has left something besides its claim, which may have been deleted."""
    return any(any(place.glob(f"{kind}{number:05d}-*")) for place, kind in ((folder.path, "*-"), (folder.attempts, "")))


def read_attempt(folder: RunFolder, number: int) -> Attempt:
    """Attempt `number` as its file stands now; of a damaged one, nothing is known but that it was."""
    try:
        claim = read_json(folder.attempts / f"{number:05d}.json")
        Shard.parse(str(claim.get("shard", WHOLE)))
    except (Damaged, ValueError):
        claim = {}
    return Attempt(folder, number, claim if has_numbers(claim, "started", "restarts", "heartbeat_seconds") else {})


def first_live(candidates: Sequence[Attempt], world: World) -> Attempt | None:
    """An attempt among `candidates` that still works.

    This takes up to their `limit` seconds if their processes are on other hosts.
    """
    unsure = []
    for attempt in candidates:
        seems = attempt.seems_live(world)
        if seems:
            return attempt
        if seems is None:
            unsure.append(attempt)
    if not unsure:
        return None
    limit = max(attempt.limit for attempt in unsure)
    others = f" and {len(unsure) - 1} more" if len(unsure) > 1 else ""
    logger.warning("%s%s may still work; watching heartbeats for up to %.0f s", unsure[0].where, others, limit)
    before = {attempt.number: attempt.heartbeats() for attempt in unsure}
    patience = time.monotonic() + limit
    while unsure and time.monotonic() < patience:
        time.sleep(min(1.0, limit / MISSED_HEARTBEATS))
        unsure = [attempt for attempt in unsure if read_attempt(attempt.folder, attempt.number).ended is None]
        for attempt in unsure:
            if attempt.heartbeats() != before[attempt.number]:
                return attempt
    return None


def check_free(folder: RunFolder, world: World, shard: Shard = WHOLE) -> list[Attempt]:
    """All attempts so far, if none that has rows of `shard` is live.

    Raises:
        CheckpointError: one is.
    """
    earlier = attempts(folder)
    candidates = list_possibly_live([attempt for attempt in earlier if attempt.shard.overlaps(shard)])
    # Ranks die with their starter, but a moment after it.
    deadline = time.monotonic() + 10.0
    leaving = [attempt for attempt in candidates if exists(attempt.claim) is False]
    while time.monotonic() < deadline and any(attempt.seems_live(world) for attempt in leaving):
        time.sleep(0.2)
    live = first_live(candidates, world)
    if live is not None:
        which = "" if live.shard == WHOLE else f", shard {live.shard}"
        raise CheckpointError(
            f"{folder.path} is in use: {live.where}{which} works on it. "
            "Wait for it, stop it, or choose another folder with -o"
        )
    return earlier


def list_possibly_live(earlier: Sequence[Attempt]) -> list[Attempt]:
    """The attempts among `earlier` (oldest first) that may be live.

    A later claim on the same rows proves that an earlier one is dead.
    """
    newest_first: list[Attempt] = []
    later: dict[int, set[int]] = {}  # indices by count, since shards of one count overlap only if they are the same
    for attempt in reversed(earlier):
        shard = attempt.shard
        others = (Shard(index, count) for count, some in later.items() if count != shard.count for index in some)
        if shard.index not in later.get(shard.count, ()) and not any(map(shard.overlaps, others)):
            newest_first.append(attempt)
            later.setdefault(shard.count, set()).add(shard.index)
    return newest_first[::-1]


def claim(
    folder: RunFolder,
    world: World,
    provenance: Mapping[str, object],
    heartbeat_seconds: float,
    checked: Sequence[Attempt] | None = None,
    shard: Shard = WHOLE,
) -> Attempt:
    """Takes the rows of `shard` in the run folder for a new attempt.

    Args:
        provenance: what this start runs on; it is only recorded, in the claim.
        checked: what `check_free` has given this start, so that a dead attempt of another host is not waited for twice.

    Raises:
        CheckpointError: another attempt is live, or the folder cannot be written.
    """
    earlier = check_free(folder, world, shard) if checked is None else list(checked)
    while True:
        number = earlier[-1].number + 1 if earlier else 1
        has_files = _has_files(folder, number)
        content: dict[str, Any] = {
            "started": time.time(),
            **myself(),
            "job": world.job,
            "restarts": world.restarts,
            "launch": world.launch,
            "heartbeat_seconds": heartbeat_seconds,
            "shard": str(shard),
            **provenance,
            # An attempt writes to files of its own alone. These numbers are claimed too: nobody else can have them.
            "ended": "not begun: files of this number are there, whose claim is gone" if has_files else None,
        }
        try:
            if make_exclusive(folder.attempts / f"{number:05d}.json", to_json(content)):
                if not has_files:
                    return Attempt(folder, number, content)
                earlier = [*earlier, Attempt(folder, number, content)]
                continue
        except OSError as error:
            raise cannot_write(folder.path, error) from error
        time.sleep(0.1)  # NFS may list the other's claim only seconds later
        earlier = check_free(folder, world, shard)


def join(folder: RunFolder, world: World, patience: float = JOIN_SECONDS) -> Attempt:
    """The attempt that rank 0 of this start has claimed; waits for it up to `patience` seconds.

    An attempt of the same launch may be the leftover of an earlier start on the same port: then it is dead, or this
    rank has a heartbeat in it already.

    Raises:
        CheckpointError: rank 0 never came.
    """
    if world.attempt is not None:
        return read_attempt(folder, world.attempt)
    deadline = time.monotonic() + patience
    of_others: set[int] = set()  # numbers of other launches, of which an array has thousands: read once
    while time.monotonic() < deadline:
        attempt = _of_launch(folder, world.launch, of_others)
        if attempt is not None and _expects(attempt, world):
            return attempt
        time.sleep(0.2)
    raise CheckpointError(
        f"rank {world.rank} waited {patience:.0f} s for rank 0 to claim {folder.path}; look into rank 0's log"
    )


def _of_launch(folder: RunFolder, launch: str, of_others: set[int]) -> Attempt | None:
    """The newest attempt of that launch; numbers of others are put into `of_others`, and passed over there."""
    for number in sorted(_numbers(folder) - of_others, reverse=True):
        attempt = read_attempt(folder, number)
        if attempt.claim.get("launch") == launch:
            return attempt
        of_others.add(number)
    return None


def _expects(attempt: Attempt, world: World) -> bool:
    heartbeats = attempt.heartbeats()
    if attempt.ended is not None or world.rank in heartbeats:
        return False
    # With few rows, rank 0 is through before others have started.
    if any(heartbeat.get("state") in ("finished", "stopped") for heartbeat in heartbeats.values()):
        return True
    return first_live([attempt], world) is not None
