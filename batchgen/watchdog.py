"""Ends a rank that waits for one that has stopped answering, and says which one that is."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Collection, Iterator
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
    thread = threading.Thread(target=_watch, args=(engine, attempt, ended), name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(engine: Engine, attempt: Attempt, ended: threading.Event) -> None:
    steps, since = engine.steps, time.monotonic()
    while not ended.wait(min(5.0, (engine.patience or 5.0) / 4)):
        patience = engine.patience
        if engine.steps != steps or patience is None:
            steps, since = engine.steps, time.monotonic()
        elif time.monotonic() - since > patience:
            who = culprits(attempt, patience, engine.awaited)
            logger.error("no step for %.0f s: %s. Ending; the same command goes on", patience, who)
            faulthandler.dump_traceback(sys.stderr)
            os._exit(RESUMABLE)


def culprits(attempt: Attempt, patience: float, awaited: Collection[int] | None = None) -> str:
    """The ranks that the others have waited for, in words, after `patience` seconds without a step.

    Of the `awaited` ranks, or all, that have not ended: those whose heartbeat has stopped, as a frozen process's or a
    cut-off node's does; if all beat, those with the fewest steps.
    """
    beats = {
        rank: beat
        for rank, beat in attempt.heartbeats().items()
        if beat.get("state") not in FINAL and (awaited is None or rank in awaited)
    }
    if not beats:
        return "no rank has a heartbeat"
    now = time.time()
    ages = {rank: now - float(beat["time"]) for rank, beat in beats.items()}
    steps = {rank: int(beat.get("steps", 0)) for rank, beat in beats.items()}
    most = max(patience / 2, 3 * float(attempt.claim["heartbeat_seconds"]))
    fewest = min(steps.values())
    named = [rank for rank in beats if ages[rank] > most] or [rank for rank in beats if steps[rank] == fewest]
    if len(named) == len(beats) > 1:
        return f"all ranks stand at step {fewest} and their heartbeats move: they wait for each other inside it"
    words = [
        f"rank {rank} (process {beats[rank].get('pid')} on {beats[rank].get('host')}, "
        f"last heartbeat {ages[rank]:.0f} s ago)"
        for rank in named
    ]
    return f"{', '.join(words)} stopped answering at step {min(steps[rank] for rank in named)}"
