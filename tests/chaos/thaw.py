"""A rank that is frozen when all others are through: nobody waits for it, so that nobody misses it."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

from tests.chaos.draw import Start
from tests.processes import ranks_of, send


def thaw_if_not_missed(starter: subprocess.Popen[bytes], mark: str, claim: Path, start: Start, seconds: float) -> None:
    """Lets the frozen ranks of the attempt with this `claim` go on, once all others have ended cleanly.

    Returns when it has, when the start has ended, or after `seconds`.
    """
    deadline = time.monotonic() + seconds
    others = [rank for rank in range(start.ranks) if rank not in start.victims]
    beats = [claim.with_name(f"{claim.stem}-{rank:05d}.json") for rank in others]
    while starter.poll() is None and time.monotonic() < deadline:
        if all(path.exists() and json.loads(path.read_bytes())["state"] == "finished" for path in beats):
            for rank, process in ranks_of(starter.pid, mark, start.ranks).items():
                if rank in start.victims:
                    send(process, signal.SIGCONT, mark)
            return
        time.sleep(0.1)
