"""The heartbeat of one rank, which shows everybody that its process lives, and how far it is."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping

from batchgen.checkpoint.attempt import HEARTBEAT_SECONDS, Attempt
from batchgen.checkpoint.process import myself
from batchgen.files import write_atomic

logger = logging.getLogger(__name__)


class Heartbeat:
    """Writes this rank's heartbeat from a thread of its own, so that it moves during a long batch too."""

    def __init__(self, attempt: Attempt, rank: int, count: Callable[[], Mapping[str, object]]):
        self._path = attempt.folder.attempts / f"{attempt.number:05d}-{rank:05d}.json"
        self._seconds = float(attempt.claim.get("heartbeat_seconds", HEARTBEAT_SECONDS))
        self._count = count  # rows, tokens and state of this rank, from another thread
        self._ended = threading.Event()
        self._writes = 0
        self._process = myself()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.write()

    def write(self) -> None:
        """Writes the heartbeat now."""
        with self._lock:
            self._writes += 1
            content = {"beat": self._writes, "time": time.time(), **self._process, **self._count()}
            try:
                write_atomic(self._path, json.dumps(content).encode(), durable=False)
            except OSError as error:
                # A full disk stops the run at its next commit; that sentence is the one to read.
                logger.warning("cannot write the heartbeat %s: %s", self._path, error)

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            self.write()
