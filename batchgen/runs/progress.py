"""Progress for a person: a bar on a terminal, a plain line every 30 s elsewhere (a Slurm log).

Counts come from the heartbeats of all ranks of the attempt, so that it is the same for one process and for many.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from batchgen.checkpoint import Attempt, Done

LINE_SECONDS = 30.0
_BAR_SECONDS = 0.5


@contextmanager
def watch(attempt: Attempt, done: Done, stream: TextIO | None = None) -> Iterator[None]:
    """Shows progress on `stream` (stderr) until the block ends, and once more at its end."""
    progress = _Progress(attempt, done, stream or sys.stderr)
    thread = threading.Thread(target=progress.run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        progress.ended.set()
        thread.join()
        progress.show(final=True)


class _Progress:
    def __init__(self, attempt: Attempt, done: Done, stream: TextIO) -> None:
        self._attempt, self._stream = attempt, stream
        self._total = len(done.states)
        self._before = done.good
        self._tokens_per_row = done.generated_tokens / done.good if done.good else None
        self._terminal = stream.isatty()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(_BAR_SECONDS if self._terminal else LINE_SECONDS):
            self.show()

    def show(self, final: bool = False) -> None:
        text = self._text()
        begin, end = "", "\n"
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            begin, text, end = "\r", text[:width].ljust(width), "\n" if final else ""
        try:
            print(begin + text, end=end, file=self._stream, flush=True)
        except OSError:
            self.ended.set()  # the terminal or the pipe is gone, and with it whoever wanted to know; the run goes on

    def _text(self) -> str:
        heartbeats = list(self._attempt.heartbeats().values())
        if not heartbeats or all(heartbeat["state"] == "loading" for heartbeat in heartbeats):
            waited = time.time() - float(self._attempt.claim["started"])
            return f"loading the model, {duration(waited)}"
        good = self._before + sum(heartbeat["rows"] - heartbeat["failed"] for heartbeat in heartbeats)
        failed = sum(heartbeat["failed"] for heartbeat in heartbeats)
        generated = sum(heartbeat["generated_tokens"] for heartbeat in heartbeats)
        ready = [heartbeat["ready"] for heartbeat in heartbeats if heartbeat["ready"]]
        seconds = time.time() - min(ready) if ready else 0.0
        rate = generated / seconds if seconds > 0 else 0.0
        parts = [f"{self._bar(good + failed)}{good + failed}/{self._total} rows", f"{rate:,.0f} tokens/s"]
        if failed:
            parts.append(f"{failed} failed")
        eta = self._eta(heartbeats, good + failed, rate)
        if eta is not None:
            parts.append(f"{duration(eta)} left")
        return ", ".join(parts)

    def _bar(self, rows: int) -> str:
        if not self._terminal:
            return ""
        filled = 20 * rows // max(self._total, 1)
        return "[" + "#" * filled + "." * (20 - filled) + "] "

    def _eta(self, heartbeats: list[dict[str, int]], settled: int, rate: float) -> float | None:
        """Seconds for the open rows, at as many tokens a row as so far: rows differ more than tokens do."""
        rows = sum(heartbeat["rows"] - heartbeat["failed"] for heartbeat in heartbeats)
        committed = sum(heartbeat["committed_tokens"] for heartbeat in heartbeats)
        per_row = committed / rows if rows else self._tokens_per_row
        if per_row is None or rate <= 0:
            return None
        in_flight = sum(heartbeat["generated_tokens"] for heartbeat in heartbeats) - committed
        return max(0.0, (self._total - settled) * per_row - in_flight) / rate


def duration(seconds: float) -> str:
    """A time for a person: 7 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole // 60 % 60:02d} min"
