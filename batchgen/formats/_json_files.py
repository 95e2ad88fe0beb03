"""What a file of JSON is by its first bytes: lines or one document, plain or compressed, in which encoding."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Literal

from batchgen.formats._json_lines import BOM

Packing = Literal["gz", "zst"]

_MAGIC: dict[bytes, Packing] = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst"}
# How a file begins that is no JSON at all, and what to do.
_OTHER_KINDS = {
    b"PAR1": "it is Parquet. Let its name end in .parquet",
    b"ARROW1": "it is Arrow. Let its name end in .arrow",
    codecs.BOM_UTF16_LE: "it is UTF-16 or UTF-32. Turn it into UTF-8: iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "it is UTF-16. Turn it into UTF-8: iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF32_BE: "it is UTF-32. Turn it into UTF-8: iconv -f UTF-32 -t UTF-8",
    b"{\0": "it is UTF-16 or UTF-32. Turn it into UTF-8: iconv -f UTF-16LE -t UTF-8",
    b"\0{": "it is UTF-16. Turn it into UTF-8: iconv -f UTF-16BE -t UTF-8",
    b"\x1f\x8b": "it is compressed with gzip twice. Unpack it once",
    b"\x28\xb5\x2f\xfd": "it is compressed with Zstandard twice. Unpack it once",
}
_ARRAY = "it is one JSON array. Turn it into lines: jq -c '.[]'"
_OBJECT = "it is JSON over several lines. Put each object on one line: jq -c ."


def packing_of(path: Path) -> Packing | None:
    """How the file is compressed, by its first bytes; one that cannot be told, by its name.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(64)
    named: dict[str, Packing] = {".gz": "gz", ".zst": "zst"}
    for magic, packing in _MAGIC.items():
        if head.startswith(magic):
            return packing
    # Damage to a compressed file must not make it one of lines that are all bad.
    return None if _is_object(head) else named.get(path.suffix.lower())


def begins_as_lines(path: Path) -> bool:
    """Whether a file begins with an object, or is compressed: then no table is meant, whatever its name says."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return False
    return _is_object(head) or head.startswith(tuple(_MAGIC))


def _is_object(head: bytes) -> bool:
    return head.removeprefix(BOM).lstrip().startswith(b"{")


def other_kind(head: bytes) -> str | None:
    """What a file is that is not JSON lines, and what to do; None: it is JSON lines, as far as `head` shows.

    Args:
        head: the first bytes of the file, unpacked: some lines of it, or a part of one.
    """
    for beginning, what in _OTHER_KINDS.items():
        if head.startswith(beginning):
            return what
    text = head.removeprefix(BOM).decode("utf-8", "ignore").strip()
    is_one_line = "\n" not in text
    if text.startswith(("[{", "[\n", "[\r\n")) or (text.startswith("[") and (is_one_line or _spans(text))):
        return _ARRAY
    return _OBJECT if text.startswith("{") and not is_one_line and _spans(text) else None


def _spans(text: str) -> bool:
    """Whether the first value of several lines goes on behind the end of its line."""
    first, _, rest = text.partition("\n")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        # Cut off: what is missing is missing at the very end. A line that is an object by itself says that the line
        # before it is a broken one.
        is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(text) - 8
        return is_cut and not _is_whole(rest.partition("\n")[0])
    except RecursionError:
        return False
    return end > len(first)


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
