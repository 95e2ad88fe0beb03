"""Files of `run-batch` on a web server: GET reads the input, and PUT writes the answers, as vLLM does it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from batchgen.files import replacing

if TYPE_CHECKING:  # its import takes a tenth of a second, which most runs do without
    import requests

_TRIES = 5  # vLLM's number, for PUT
_BACKOFF_SECONDS = 1.5  # before the second repetition of a PUT; it doubles with each one after, to some 20 s in all
_GET_BACKOFF_SECONDS = 0.25  # of a GET, whose address may be wrong: some 3 s in all
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
        _session(range(500, 600), _GET_BACKOFF_SECONDS) as session,
    ):
        with _errors_without_the_url():
            answer = session.get(url, headers=headers, stream=True, timeout=_TIMEOUT_SECONDS)
        with answer:
            _check_status(answer)
            with _errors_without_the_url():
                try:
                    for piece in answer.iter_content(_PIECE_BYTES):
                        file.write(piece)
                except ChunkedEncodingError:
                    raise OSError(f"it broke off after {file.tell()} bytes") from None


def put(generations: Path, url: str) -> None:
    """Writes a file to `url`; tries it five times.

    Raises:
        OSError: it cannot be written.
    """
    # A signed URL is for one content type.
    headers = {"Content-Type": "application/octet-stream"}
    with _session(range(400, 600), _BACKOFF_SECONDS) as session, open(generations, "rb") as body:
        with _errors_without_the_url():
            answer = session.put(url, data=body, headers=headers, timeout=_TIMEOUT_SECONDS)
        _check_status(answer)


@contextmanager
def _errors_without_the_url() -> Iterator[None]:
    """Raises the errors of the library in words of our own: its words hold the URL, which may be signed."""
    from requests.exceptions import RequestException

    try:
        yield
    except RequestException as error:
        raise OSError(_find_cause(error)) from None


def _find_cause(error: BaseException) -> str:
    """What the operating system said, if it said anything; else the kind of error."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        reasons = [getattr(inner, "reason", None), *inner.args, inner.__cause__, inner.__context__]
        inner = next((reason for reason in reasons if isinstance(reason, BaseException)), None)
    return type(error).__name__


def _session(retry_statuses: Collection[int], backoff_seconds: float) -> requests.Session:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    retry = Retry(
        _TRIES - 1,
        status_forcelist=retry_statuses,
        allowed_methods=None,  # every method: a PUT of the whole file can be repeated
        backoff_factor=backoff_seconds,
        raise_on_status=False,
    )
    session = requests.Session()
    session.auth = lambda request: request  # else a password in ~/.netrc would be sent beside a signature
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def _check_status(answer: requests.Response) -> None:
    if not answer.ok:
        raise OSError(f"HTTP Error {answer.status_code}: {answer.reason}")
