"""Importing of heavy packages."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Inside, Python looks for no garbage: an import makes hundreds of thousands of objects that stay.

    To look through all of them again and again takes a fifth of the time in which torch and Transformers are imported.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
