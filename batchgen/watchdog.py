"""Ends a rank that waits for one that has stopped answering, and says which one that is."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from batchgen.checkpoint import FINAL, Attempt
from batchgen.engine import Engine

logger = logging.getLogger(__name__)

RESUMABLE = 75  # the exit code of a run that goes on when it is started again


@contextmanager
def watching(engine: Engine, attempt: Attempt) -> Iterator[None]:
    """Meanwhile, ends this process if `engine` makes no step for as long as its `patience`.

    Its thread waits inside a collective, out of reach of signals and exceptions; so the whole process goes, and what is
    recorded stays. Ranks that wait for nobody have no patience to lose.
    """
    if engine.patience is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(engine, attempt, engine.patience, ended), name="watchdog", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(engine: Engine, attempt: Attempt, patience: float, ended: threading.Event) -> None:
    steps, since = engine.steps, time.monotonic()
    while not ended.wait(min(5.0, patience / 4)):
        if engine.steps != steps:
            steps, since = engine.steps, time.monotonic()
        elif time.monotonic() - since > patience:
            logger.error("no step for %.0f s: %s. Ending; the same command goes on", patience, culprits(attempt))
            faulthandler.dump_traceback(sys.stderr)
            os._exit(RESUMABLE)


def culprits(attempt: Attempt) -> str:
    """The ranks that the others wait for, in words: those with the fewest steps among the ranks that have not ended."""
    beats = {rank: beat for rank, beat in attempt.heartbeats().items() if beat.get("state") not in FINAL}
    if not beats:
        return "no rank has a heartbeat"
    fewest = min(int(beat.get("steps", 0)) for beat in beats.values())
    behind = [
        f"rank {rank} (process {beat.get('pid')} on {beat.get('host')}, "
        f"last heartbeat {time.time() - float(beat['time']):.0f} s ago)"
        for rank, beat in beats.items()
        if int(beat.get("steps", 0)) == fewest
    ]
    if len(behind) == len(beats) > 1:
        oldest = min(beats, key=lambda rank: float(beats[rank]["time"]))
        return f"all ranks stand at step {fewest}; the oldest heartbeat is that of rank {oldest}"
    return f"{', '.join(behind)} stopped answering at step {fewest}"
