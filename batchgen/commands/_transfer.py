"""Files that `run-batch` reads with GET and writes with PUT, as vLLM does."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

_PUT_TRIES = 5  # vLLM's, as is the wait
_PUT_WAIT_SECONDS = 5
_TIMEOUT_SECONDS = 1000


def is_url(name: str) -> bool:
    """Whether this file is read with GET, or written with PUT."""
    return name.startswith(("http://", "https://"))


def fetch(url: str, place: Path) -> None:
    """Reads `url` into the file `place`, which appears when it is whole.

    May raise OSError, ValueError, HTTPException.
    """
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix="fetched-", suffix=".jsonl", delete=False) as file:
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:
                shutil.copyfileobj(answer, file)
                announced = answer.headers.get("Content-Length")
            file.flush()
            # urllib takes a connection that breaks for the end.
            if announced is not None and file.tell() != int(announced):
                raise OSError(f"it broke off after {file.tell()} of {announced} bytes")
            os.replace(file.name, place)
        except BaseException:
            os.unlink(file.name)
            raise


def put(generations: Path, url: str) -> None:
    """Writes a file to `url`. May raise OSError, HTTPException."""
    for attempt in range(1, _PUT_TRIES + 1):
        try:
            with open(generations, "rb") as body:
                # urllib would call it a form, and a signed URL is for one content type.
                headers = {
                    "Content-Length": str(generations.stat().st_size),
                    "Content-Type": "application/octet-stream",
                }
                request = urllib.request.Request(url, body, headers, method="PUT")
                with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
                    return  # 2xx; anything else is an exception
        except (OSError, HTTPException) as error:
            if isinstance(error, HTTPError):
                error.close()  # it holds the connection
            if attempt == _PUT_TRIES:
                raise
            time.sleep(_PUT_WAIT_SECONDS)
