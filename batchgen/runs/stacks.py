"""Where every thread of an attempt's ranks stands: asked for when one of them makes no progress.

    attempts/00001-stall.txt             why they are asked for, and on which host that was noticed; made exclusively
    attempts/00001-stacks-00000.txt      rank 0's answer, made exclusively by whoever of its host comes first

A rank answers a signal with its interpreter's own dump (`faulthandler`), which needs neither the interpreter's lock nor
the main thread: an endless loop answers, and so does a thread that waits inside a library. It goes into nameless memory
that other processes of this user can read through /proc/PID/fd, so that an attempt which goes well leaves no file.

Without the lock, the dump reads the frames of threads that may be running, and can crash the process. So whoever still
can answers by itself first (`answer`), and is sent no signal.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from batchgen.checkpoint import FINAL, Attempt
from batchgen.checkpoint.files import make_exclusive
from batchgen.checkpoint.process import exists

logger = logging.getLogger(__name__)

SIGNAL = signal.SIGRTMIN + 5  # Slurm's users, submitit and some libraries have USR1 and USR2 for themselves
ANSWER_SECONDS = 5.0  # that a process may take: the dump itself is a matter of milliseconds

_MEMORY = "batchgen-stacks"
_STATES = {
    "D": "waits for a disk or a network file system",
    "R": "runs",
    "S": "sleeps",
    "T": "stopped (SIGSTOP)",
    "t": "held by a debugger",
    "Z": "has ended",
}  # see proc(5)


@contextmanager
def answering() -> Iterator[None]:
    """Meanwhile, this process answers `SIGNAL`."""
    memory = os.memfd_create(_MEMORY)
    faulthandler.register(SIGNAL, file=memory, all_threads=True)
    try:
        yield
    finally:
        faulthandler.unregister(SIGNAL)
        os.close(memory)


def answer() -> None:
    """Answers for this process, from a thread that has the interpreter's lock, before it is asked; once."""
    memory = _memory_of(os.getpid())
    if memory is None or memory.read_bytes():
        return
    try:
        with memory.open("ab") as file:
            faulthandler.dump_traceback(file)
    except OSError as error:
        logger.warning("cannot say where this process stands: %s", error)


def request(attempt: Attempt, why: str) -> bool:
    """Asks all ranks of `attempt` for their stacks; True: nobody had before."""
    return make_exclusive(_request(attempt), f"{why}\n{socket.gethostname()}\n".encode("utf-8", "backslashreplace"))


def requested(attempt: Attempt) -> tuple[str, bool] | None:
    """Why the ranks of `attempt` are asked for their stacks, and whether a process of this host asks; None: they are
    not."""
    try:
        why, _, host = _request(attempt).read_text("utf-8").rstrip("\n").rpartition("\n")
    except OSError:
        return None
    return why, host == socket.gethostname()


def collect(attempt: Attempt) -> dict[int, str]:
    """The answers of the ranks of this host, also put beside the claim; of other hosts' ranks, where they are.

    A process that cannot answer has what the kernel says of its threads instead.
    """
    heartbeats = attempt.heartbeats()
    there = {rank: exists(heartbeat) for rank, heartbeat in heartbeats.items()}
    answers = _await(
        {
            rank: int(heartbeat["pid"])
            for rank, heartbeat in heartbeats.items()
            if there[rank] and _ask(int(heartbeat["pid"]))
        }
    )
    reports: dict[int, str] = {}
    for rank, heartbeat in heartbeats.items():
        who = f"rank {rank}, process {heartbeat.get('pid')} on {heartbeat.get('host')}"
        if there[rank] is None:
            age = time.time() - float(heartbeat["time"])
            reports[rank] = f"{who}: on another host; its last heartbeat came {age:.0f} s ago"
        elif there[rank]:
            reports[rank] = f"{who}:\n{_described(int(heartbeat['pid']), answers.get(rank, ''))}"
            _keep(attempt, rank, reports[rank])
        else:
            ended = "has ended cleanly" if heartbeat.get("state") in FINAL else "is gone"
            reports[rank] = f"{who}: {ended}"
    return reports


def has_answered(attempt: Attempt, rank: int) -> bool:
    """Whether the answer of that rank is kept."""
    return _answer_of(attempt, rank).exists()


def _request(attempt: Attempt) -> Path:
    return attempt.folder.attempts / f"{attempt.number:05d}-stall.txt"


def _answer_of(attempt: Attempt, rank: int) -> Path:
    return attempt.folder.attempts / f"{attempt.number:05d}-stacks-{rank:05d}.txt"


def _keep(attempt: Attempt, rank: int, text: str) -> None:
    path = _answer_of(attempt, rank)
    try:
        make_exclusive(path, f"{text}\n".encode("utf-8", "backslashreplace"))
    except OSError as error:
        logger.warning("cannot write %s: %s", path, error)  # the log has them


def _ask(pid: int) -> bool:
    """Whether the process can answer; a signal that it does not know would end it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16)
        if not caught >> (SIGNAL - 1) & 1:
            return False
        if pid == os.getpid():
            answer()
        elif not _answer(pid):  # not twice, if two ask
            os.kill(pid, SIGNAL)
    except OSError:
        return False
    return True


def _await(processes: Mapping[int, int]) -> dict[int, str]:
    """What these processes answer, by rank: complete once it grows no more."""
    answers: dict[int, str] = {}
    deadline = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.2)
        before, answers = answers, {rank: _answer(pid) or answers.get(rank, "") for rank, pid in processes.items()}
        silent = [_thread(Path(f"/proc/{pid}"))[1] for rank, pid in processes.items() if not answers[rank]]
        if answers == before and all(state in "TtZ" for state in silent):
            break
    return answers


def _answer(pid: int) -> str:
    try:
        memory = _memory_of(pid)
        return "" if memory is None else memory.read_text("utf-8", "backslashreplace")
    except OSError:
        return ""  # it has just ended


def _memory_of(pid: int) -> Path | None:
    """Where that process answers; None: it does not, or has just ended."""
    try:
        links = list(Path(f"/proc/{pid}/fd").iterdir())
        return next((link for link in links if os.readlink(link).startswith(f"/memfd:{_MEMORY}")), None)
    except OSError:
        return None


def _described(pid: int, answer: str) -> str:
    threads = Counter(_thread(task) for task in sorted(Path(f"/proc/{pid}/task").glob("*")))
    if not answer:
        stopped = ": it is stopped" if _thread(Path(f"/proc/{pid}"))[1] in "Tt" else ""
        answer = f"it does not answer{stopped}. Only the kernel can say where it is"
    lines = [answer.rstrip(), "The kernel says of its threads:"]
    for (name, state, place), count in threads.items():
        where = f" in {place}" if place else ""
        lines.append(f"  {count} x {name}: {_STATES.get(state, state)}{where}")
    return "\n".join(lines)


def _thread(task: Path) -> tuple[str, str, str]:
    """Name, state and, where the kernel tells, the kernel's function that it waits in. See proc(5)."""
    try:
        name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
        place = (task / "wchan").read_text().strip()
    except OSError:
        return "", "Z", ""
    return name, rest.split()[0], place.strip("0")
