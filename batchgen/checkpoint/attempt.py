"""One start of a run: its claim on the run folder, and the heartbeats of its ranks.

    attempts/00001.json           the claim, made exclusively: host, process, Slurm job, world; at the end how it ended
    attempts/00001-00000.json     rank 0's heartbeat, rewritten every few seconds

A claim is live while its process exists on this host or, from another host, while a heartbeat still moves. No file
locks: NFS and Lustre have them only sometimes.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchgen.checkpoint.files import (
    CheckpointError,
    cannot_write,
    make_exclusive,
    read_json,
    read_whole,
    to_json,
    write_atomic,
)
from batchgen.checkpoint.folder import RunFolder
from batchgen.world import World

logger = logging.getLogger(__name__)

# A heartbeat that has not moved for this many intervals is that of a dead process. NFS may show a file of another host
# up to 60 s late (its default acregmax, acdirmax), so with the default interval of 5 s the limit is 90 s.
MISSED_BEATS = 18
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
    def limit(self) -> float:
        """Seconds without a heartbeat after which another host may take the attempt for dead."""
        return MISSED_BEATS * float(self.claim.get("heartbeat_seconds", HEARTBEAT_SECONDS))

    @property
    def where(self) -> str:
        """Host and process, for a person."""
        return f"attempt {self.number}, process {self.claim.get('pid')} on {self.claim.get('host')}"

    def heartbeats(self) -> dict[int, dict[str, Any]]:
        """The last heartbeat of every rank."""
        beats: dict[int, dict[str, Any]] = {}
        for path in sorted(self.folder.attempts.glob(f"{self.number:05d}-*.json")):
            rank = path.stem.partition("-")[2]
            try:
                beat = json.loads(read_whole(path))
            except (ValueError, FileNotFoundError):
                continue  # a power cut can empty it, since it is not synced
            except OSError as error:
                raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
            if rank.isdigit() and isinstance(beat, dict):
                beats[int(rank)] = beat
        return beats

    def end(self, how: str) -> None:
        """Records that the attempt is over. Only its own process calls this."""
        write_atomic(self.path, to_json({**self.claim, "ended": how, "ended_at": time.time()}))

    def is_live(self, world: World) -> bool:
        """Whether the attempt still works. Takes up to `limit` seconds if its process is on another host."""
        seen = self.is_here()
        if self.ended is not None or seen is False:
            return False
        if seen:
            return True
        if world.job and self.claim.get("job") == world.job and int(self.claim.get("restarts", 0)) < world.restarts:
            return False  # Slurm has ended it to start us
        logger.warning("%s may still work; watching its heartbeat for up to %.0f s", self.where, self.limit)
        before = self.heartbeats()
        patience = time.monotonic() + self.limit
        while time.monotonic() < patience:
            time.sleep(min(1.0, self.limit / MISSED_BEATS))
            if latest(self.folder, self.number).ended is not None:
                return False
            if self.heartbeats() != before:
                return True
        return False

    def is_here(self) -> bool | None:
        """Whether one of its processes exists, as far as this host can tell; None if one works where we cannot look."""
        working = [beat for beat in self.heartbeats().values() if beat.get("state") not in FINAL]
        seen = [_exists(process) for process in (self.claim, *working)]
        if True in seen:
            return True
        return None if None in seen else False


def _exists(process: Mapping[str, Any]) -> bool | None:
    if any(process.get(name) != value for name, value in _here().items()):
        return None
    try:
        return _process_started(int(process["pid"])) == int(process["process_started"])
    except PermissionError:
        return None


def _here() -> dict[str, str]:
    """What a process id is valid in: host, boot and (containers) process namespace."""
    return {
        "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "namespace": os.readlink("/proc/self/ns/pid"),
    }


def _myself() -> dict[str, Any]:
    return {**_here(), "pid": os.getpid(), "process_started": _process_started(os.getpid())}


def _process_started(pid: int) -> int | None:
    """Clock ticks from boot to the start of process `pid`, so that a reused id is not taken for it; None if it is gone.

    Field 22 of /proc/PID/stat, counted after the name, which may hold spaces and parentheses. See proc(5).

    Raises:
        PermissionError: it is there, but this user may not look at it.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        with suppress(ProcessLookupError):
            os.kill(pid, 0)  # where /proc is mounted with hidepid, other people's processes are not in it
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # a zombie works no more


def attempts(folder: RunFolder) -> list[Attempt]:
    """All attempts so far, oldest first."""
    numbers = sorted(int(path.stem) for path in folder.attempts.glob("*.json") if path.stem.isdigit())
    return [latest(folder, number) for number in numbers]


def latest(folder: RunFolder, number: int) -> Attempt:
    """Attempt `number` as its file stands now."""
    return Attempt(folder, number, read_json(folder.attempts / f"{number:05d}.json"))


def check_free(folder: RunFolder, world: World) -> list[Attempt]:
    """All attempts so far, if none of them is live.

    Raises:
        CheckpointError: one is.
    """
    known = attempts(folder)
    # Ranks die with their starter, but a moment after it.
    deadline = time.monotonic() + 10.0
    while known and _exists(known[-1].claim) is False and known[-1].is_live(world) and time.monotonic() < deadline:
        time.sleep(0.2)
    if known and known[-1].is_live(world):
        raise CheckpointError(
            f"{folder.path} is in use: {known[-1].where} works on it. "
            "Wait for it, stop it, or choose another folder with -o"
        )
    return known


def claim(
    folder: RunFolder,
    world: World,
    facts: Mapping[str, object],
    heartbeat_seconds: float,
    checked: Sequence[Attempt] | None = None,
) -> Attempt:
    """Takes the run folder for a new attempt.

    Args:
        checked: what `check_free` has given this start, so that a dead attempt of another host is not waited for twice.

    Raises:
        CheckpointError: another attempt is live, or the folder cannot be written.
    """
    known = check_free(folder, world) if checked is None else list(checked)
    while True:
        number = known[-1].number + 1 if known else 1
        made: dict[str, Any] = {
            "started": time.time(),
            **_myself(),
            "job": world.job,
            "restarts": world.restarts,
            "launch": world.launch,
            "heartbeat_seconds": heartbeat_seconds,
            **facts,
            "ended": None,
        }
        try:
            if make_exclusive(folder.attempts / f"{number:05d}.json", to_json(made)):
                return Attempt(folder, number, made)
        except OSError as error:
            raise cannot_write(folder.path, error) from error
        time.sleep(0.1)  # NFS may list the other's claim only seconds later
        known = check_free(folder, world)


def join(folder: RunFolder, world: World, patience: float = JOIN_SECONDS) -> Attempt:
    """The attempt that rank 0 of this start has claimed; waits for it up to `patience` seconds.

    An attempt of the same launch may be the leftover of an earlier start on the same port: then it is dead, or this
    rank has a heartbeat in it already.

    Raises:
        CheckpointError: rank 0 never came.
    """
    if world.attempt is not None:
        return latest(folder, world.attempt)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        known = attempts(folder)
        if known and _expects(known[-1], world):
            return known[-1]
        time.sleep(0.2)
    raise CheckpointError(
        f"rank {world.rank} waited {patience:.0f} s for rank 0 to claim {folder.path}; look into rank 0's log"
    )


def _expects(attempt: Attempt, world: World) -> bool:
    beats = attempt.heartbeats()
    if attempt.ended is not None or attempt.claim.get("launch") != world.launch or world.rank in beats:
        return False
    # With few rows, rank 0 is through before others have started.
    return any(beat.get("state") in ("finished", "stopped") for beat in beats.values()) or attempt.is_live(world)


class Heartbeat:
    """Writes this rank's heartbeat from a thread of its own, so that it moves during a long batch too."""

    def __init__(self, attempt: Attempt, rank: int, count: Callable[[], Mapping[str, object]]):
        self._path = attempt.folder.attempts / f"{attempt.number:05d}-{rank:05d}.json"
        self._seconds = float(attempt.claim.get("heartbeat_seconds", HEARTBEAT_SECONDS))
        self._count = count  # rows, tokens and state of this rank, from another thread
        self._ended = threading.Event()
        self._beats = 0
        self._process = _myself()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.beat()

    def beat(self) -> None:
        """Writes the heartbeat now."""
        with self._lock:
            self._beats += 1
            beat = {"beat": self._beats, "time": time.time(), **self._process, **self._count()}
            try:
                write_atomic(self._path, json.dumps(beat).encode(), durable=False)
            except OSError as error:
                # A full disk stops the run at its next commit; that sentence is the one to read.
                logger.warning("cannot write the heartbeat %s: %s", self._path, error)

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            self.beat()
