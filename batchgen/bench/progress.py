"""The progress of a workload that is measured, which may take an hour: what one rank logs meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from batchgen.engine import SignsOfLife
from batchgen.runs.progress import LINE_SECONDS

logger = logging.getLogger(__name__)


@contextmanager
def logging_tokens(signs: SignsOfLife, name: str, max_tokens: int) -> Iterator[None]:
    """Meanwhile logs, every `LINE_SECONDS`, how many tokens the engine of `signs` has generated.

    Args:
        name: what is measured.
        max_tokens: the tokens that it generates if no row ends by itself.
    """
    before, ended = signs.generated_tokens, threading.Event()

    def log() -> None:
        while not ended.wait(LINE_SECONDS):
            logger.info(
                "%s: %s of %s tokens generated", name, f"{signs.generated_tokens - before:,}", f"{max_tokens:,}"
            )

    thread = threading.Thread(target=log, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
