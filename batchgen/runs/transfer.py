"""Files of `run-batch` on a web server: GET reads the input, and PUT writes the answers, as vLLM does it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from batchgen.files import replacing

if TYPE_CHECKING:  # its import takes a tenth of a second, which most runs do without
    import requests

_TRIES = 5  # vLLM's number, for PUT
_BACKOFF_SECONDS = 2.5  # before the second repetition; it doubles with each one after
_TIMEOUT_SECONDS = 1000  # without a byte
_PIECE_BYTES = 1 << 20


def is_url(name: str) -> bool:
    """Whether this file is read with GET, or written with PUT."""
    return name.startswith(("http://", "https://"))


def fetch(url: str, place: Path) -> None:
    """Reads `url` into the file `place`, which appears when it is whole.

    Raises:
        OSError: it cannot be read, or `place` cannot be written.
    """
    from requests.exceptions import ChunkedEncodingError

    headers = {"Accept-Encoding": "identity"}  # a file that is compressed stays so
    with (
        replacing(place, durable=False) as scratch,
        open(scratch, "xb") as file,
        _session(retry_statuses=range(500, 600)) as session,
        session.get(url, headers=headers, stream=True, timeout=_TIMEOUT_SECONDS) as answer,
    ):
        _check_status(answer)
        try:
            for piece in answer.iter_content(_PIECE_BYTES):
                file.write(piece)
        except ChunkedEncodingError as error:
            raise OSError(f"it broke off after {file.tell()} bytes") from error


def put(generations: Path, url: str) -> None:
    """Writes a file to `url`; tries it five times.

    Raises:
        OSError: it cannot be written.
    """
    # A signed URL is for one content type.
    headers = {"Content-Type": "application/octet-stream"}
    with _session(retry_statuses=range(400, 600)) as session, open(generations, "rb") as body:
        _check_status(session.put(url, data=body, headers=headers, timeout=_TIMEOUT_SECONDS))


def _session(retry_statuses: Collection[int]) -> requests.Session:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    retry = Retry(
        _TRIES - 1,
        status_forcelist=retry_statuses,
        allowed_methods=None,  # every method: a PUT of the whole file can be repeated
        backoff_factor=_BACKOFF_SECONDS,
        raise_on_status=False,
    )
    session = requests.Session()
    session.auth = lambda request: request  # else a password in ~/.netrc would be sent beside a signature
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def _check_status(answer: requests.Response) -> None:
    if not answer.ok:  # in words of our own: those of the library hold the URL, which may be signed
        raise OSError(f"HTTP Error {answer.status_code}: {answer.reason}")
