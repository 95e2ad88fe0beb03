"""Which rows are lines of an OpenAI batch file, and what a row is called. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from batchgen.formats import place_of
from batchgen.requests.refusal import Refused, quote
from batchgen.types import Row, RowError

IdPrefix = Literal["file"]
"""What stands before the ids that rows have themselves: the name of their file, as in `a.jsonl:7`."""

_VERSION = "/v1"
# Azure's batch files leave the version out.
_WITHOUT_VERSION = frozenset({"/chat/completions", "/completions", "/responses", "/embeddings"})


def endpoint(url: str) -> str:
    """The endpoint that a line's `url` names, as OpenAI writes it."""
    return _VERSION + url if url in _WITHOUT_VERSION else url


def is_request(columns: Mapping[str, object]) -> bool:
    """Whether a row is a request line, be it a faulty one, and not a plain row that happens to have a `body`."""
    if "body" not in columns:  # left out, perhaps
        return "custom_id" in columns and _is_endpoint(columns.get("url"))
    body, url = columns["body"], columns.get("url")
    if isinstance(body, Mapping) and _is_endpoint(url):
        return True
    # In Parquet every row has every column, so a plain row beside request lines has these as nulls.
    named = columns.get("custom_id") is not None or (body is not None and "custom_id" in columns)
    return named and ("url" in columns or "method" in columns)


def _is_endpoint(url: object) -> bool:
    return isinstance(url, str) and endpoint(url).startswith(f"{_VERSION}/")


def may_be_request(columns: Mapping[str, object]) -> bool:
    """Whether a row has the id of a request line and nothing to make a plain prompt of: a faulty line among others."""
    return columns.get("custom_id") is not None and columns.get("prompt") is None and columns.get("messages") is None


def are_requests(rows: Iterable[Row]) -> bool:
    """Whether these are the first rows of an OpenAI batch file: the first that can be told is a request line."""
    for row in rows:
        if not isinstance(row.value, RowError):
            if is_request(row.value):
                return True
            if not may_be_request(row.value):
                return False
    return False


def own_id(value: Mapping[str, object] | RowError) -> str | None:
    """The row's `id` or `custom_id`, if it has a valid one."""
    if isinstance(value, RowError):
        return value.id
    try:
        return read_id(value)
    except Refused:
        return None


def row_id(row: Row, prefix: IdPrefix | None = None) -> str:
    """The row's own id, else one from its file and line."""
    return called(row, own_id(row.value), prefix)


def called(row: Row, own: str | None, prefix: IdPrefix | None) -> str:
    """What a row with the id `own`, or without one, is called."""
    if own is None:
        return place_of(row.source, row.line)
    return own if prefix is None else f"{row.source}:{own}"


def read_id(columns: Mapping[str, object]) -> str | None:
    """The row's `id` or `custom_id`; None if it has none, or is a request line, whose id `openai.parse` judges.

    Raises:
        Refused: it has one that cannot be an id.
    """
    own = columns.get("id")
    if type(own) is str and own and "body" not in columns:
        return own  # nearly every row: the rest only says the same more slowly
    if is_request(columns):
        own = columns.get("custom_id")
        return own if isinstance(own, str) and own else _decimal(own)
    name, own = "id", columns.get("id")
    if own is None:
        name, own = "custom_id", columns.get("custom_id")
    if own is None or (isinstance(own, str) and own):
        return own
    number = _decimal(own)
    if number is None:
        raise Refused("wrong_type", f"{name} must be a text that is not empty or a whole number, not {quote(own)}")
    return number


def _decimal(own: object) -> str | None:
    """The digits of a whole number."""
    if isinstance(own, float) and own.is_integer():  # a Parquet column of whole numbers with gaps
        own = int(own)
    # Beyond some thousand digits Python refuses to write a number.
    is_whole = isinstance(own, int) and not isinstance(own, bool) and own.bit_length() <= 4096
    return str(own) if is_whole else None
