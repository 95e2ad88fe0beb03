"""Which process is meant: ids are used again, and mean nothing on another host or in another container."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def exists(process: Mapping[str, Any]) -> bool | None:
    """Whether it exists; None: it is not of this host, or not ours to look at."""
    if any(process.get(name) != value for name, value in here().items()):
        return None
    try:
        return process_started(int(process["pid"])) == int(process["process_started"])
    except (PermissionError, KeyError, TypeError, ValueError):  # the last three: of a damaged file
        return None


def here() -> dict[str, str]:
    """What a process id is valid in: host, boot and (containers) process namespace."""
    return {
        "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "namespace": os.readlink("/proc/self/ns/pid"),
    }


def myself() -> dict[str, Any]:
    """What tells this process from all others."""
    return {**here(), "pid": os.getpid(), "process_started": process_started(os.getpid())}


def process_started(pid: int) -> int | None:
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
