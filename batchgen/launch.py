"""Starts the ranks of `batchgen run --ranks N` on this host, and sees to it that none outlives the starter.

The starter claims the run folder, starts its own command N times, passes signals on, waits, and merges; it loads no
model. The variables it sets are torchrun's, so that an engine cannot tell the difference.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from batchgen import stacks
from batchgen.checkpoint import Attempt
from batchgen.stacks import ANSWER_SECONDS
from batchgen.stop import Stop
from batchgen.watchdog import Ranks, report, stalled
from batchgen.world import free_port

logger = logging.getLogger(__name__)

GRACE_SECONDS = 30.0  # for the other ranks to commit and end after one has died
_PR_SET_PDEATHSIG = 1  # see prctl(2)


def start_ranks(
    attempt: Attempt | None,
    command: Sequence[str],
    count: int,
    stop: Stop,
    environment: Mapping[str, str],
    stall_seconds: float = 0.0,
) -> list[int]:
    """Runs `python -m batchgen COMMAND…` as `count` ranks to their end; gives their exit codes, negative for a signal.

    They belong to `attempt`, unless what they do is no run.

    If one rank dies, the others get SIGTERM, and `GRACE_SECONDS` later SIGKILL; at once if those that are left are
    frozen. A rank that makes no progress for `stall_seconds` (0: any time) is one that has died, after all ranks'
    stacks have been logged.
    """
    port = free_port()
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        numbers = range(0 if stop() else count)
        ranks.extend(_start(command, _variables(attempt, rank, count, port, environment)) for rank in numbers)
        return _wait(ranks, stop, attempt, stall_seconds)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _variables(
    attempt: Attempt | None, rank: int, count: int, port: int, environment: Mapping[str, str]
) -> dict[str, str]:
    # In a one-process torchrun, that one's store would be taken for that of these ranks.
    variables = {name: value for name, value in environment.items() if not name.startswith("TORCHELASTIC_")}
    # As torchrun does, but all cores: N ranks with a thread a core each would get in each other's way.
    variables.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    variables.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        BATCHGEN_STARTER=str(os.getpid()),
    )
    if attempt is not None:
        variables["BATCHGEN_ATTEMPT"] = str(attempt.number)
    return variables


def _start(command: Sequence[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
    # A session of its own: an interrupt at the terminal reaches the starter alone, which passes it on once.
    return subprocess.Popen(
        [sys.executable, "-m", "batchgen", *command],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=2,  # stdout carries results only, whatever a library prints
        start_new_session=True,
    )


def _wait(ranks: list[subprocess.Popen[bytes]], stop: Stop, attempt: Attempt | None, stall_seconds: float) -> list[int]:
    passed_on: int | None = None
    deadline: float | None = None
    watched = Ranks(attempt, stall_seconds) if attempt is not None else None
    while _alive(ranks):
        if attempt is not None and watched is not None and deadline is None:
            for rank in _ended_for_standing(ranks, attempt, watched, stall_seconds):
                rank.wait()
        if stop.signal is not None and passed_on is None:
            passed_on = stop.signal
            _send(ranks, passed_on)
        if deadline is None and any(rank.returncode for rank in ranks):
            dead = next(number for number, rank in enumerate(ranks) if rank.returncode)
            if passed_on is None or ranks[dead].returncode != -passed_on:  # that one came before the rank's handler
                reason = f"rank {dead} died (exit code {ranks[dead].returncode})"
                logger.error("%s; ending the others", reason)
                # The watchdog of a rank has more to say.
                asked = stacks.requested(attempt) if attempt is not None else None
                stop.request(reason if asked is None else asked[0])
            _send(ranks, signal.SIGTERM)
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and (time.monotonic() > deadline or all(map(_is_frozen, _alive(ranks)))):
            _send(ranks, signal.SIGKILL)
        time.sleep(0.05)
    return [rank.returncode for rank in ranks]


def _ended_for_standing(
    ranks: list[subprocess.Popen[bytes]], attempt: Attempt, watched: Ranks, seconds: float
) -> list[subprocess.Popen[bytes]]:
    """Those that could not watch themselves, and now are killed."""
    standing = watched.standing([number for number, rank in enumerate(ranks) if rank.poll() is None])
    if standing and not report(attempt, stalled(attempt, seconds, standing)):
        with suppress(subprocess.TimeoutExpired):
            ranks[standing[0]].wait(timeout=ANSWER_SECONDS)  # a rank has noticed it too, and is asking them
    for number in standing:
        ranks[number].kill()
    return [ranks[number] for number in standing]


def _is_frozen(rank: subprocess.Popen[bytes]) -> bool:
    """Whether it is stopped (SIGSTOP): it will not hear SIGTERM however long one waits. See proc(5)."""
    try:
        return Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _send(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in _alive(ranks):
        rank.send_signal(number)


def _alive(ranks: list[subprocess.Popen[bytes]]) -> list[subprocess.Popen[bytes]]:
    # All are asked every time: with `any` alone, nobody would see rank 1 die while rank 0 lives.
    return [rank for rank in ranks if rank.poll() is None]


def die_with(starter: int) -> None:
    """Lets the kernel kill this process when its parent, the starter, is gone, however that one died."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != starter:  # it died before we asked
        os._exit(75)
