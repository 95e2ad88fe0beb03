"""Compressed JSON lines: how a file is compressed, and its text."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from batchgen.formats import InputError
from batchgen.formats._json_files import Packing, packing_of

WINDOW = 1 << 18  # bytes read at once: more costs no less time, and only this much lies around


def packed(path: Path) -> Packing | None:
    """How the file is compressed, if it is.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return packing_of(path)
    except OSError as error:
        raise InputError(f"cannot read or write {path}: {error.strerror or error}") from error


@contextmanager
def open_unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """The unpacked text. Reading it may raise EOFError, zlib.error or OSError."""
    with ExitStack() as files:
        raw: Any
        if packed(path) == "gz":
            raw = files.enter_context(gzip.open(path, "rb"))
        else:
            import pyarrow as pa  # has Zstandard, which the standard library of Python 3.11 has not

            raw = files.enter_context(pa.input_stream(pa.OSFile(os.fsencode(path)), compression="zstd"))
        yield files.enter_context(io.BufferedReader(raw, WINDOW))
