"""The stop request: signals set it here, a full disk or too many failed rows in `worker`, a lost rank in `launcher`.

Engines look at it before every decode step.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

# SIGUSR2 is what Slurm is asked to send ahead of the time limit.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Stop:
    """Calling it says whether the run shall end; `reason` says why."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.signal: int | None = None  # the signal that asked, to be passed on to ranks

    def __call__(self) -> bool:
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Asks the run to end cleanly. The first reason stays."""
        if self.reason is None:
            self.reason = reason

    @contextmanager
    def on_signals(self, signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
        """Turns signals into requests meanwhile; a second interrupt ends the process at once.

        To be entered before the model loads, which takes minutes: SIGUSR2 kills a process that has no handler.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # the caller of the Python API owns the signals
            return
        before = {number: signal.signal(number, self._handle) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        self.request(f"stopped by {signal.Signals(number).name}")
