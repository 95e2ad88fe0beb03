"""The bytes of a token that is a part of a character, read off its name in the vocabulary.

Vocabularies write such a token in two ways: byte-level ones (GPT-2's) have a letter for each byte, and SentencePiece's
byte fallback is `<0xNN>`.
"""

from __future__ import annotations

import re

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _letters() -> dict[str, int]:
    """GPT-2's letter of each byte (`bytes_to_unicode`): itself where it can be seen, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _letters()


def decode_parts(name: str) -> str | None:
    """The text of the token that the vocabulary calls `name`, each byte that is no whole character as a lone surrogate.

    None: the name says nothing of bytes.
    """
    if match := _FALLBACK.fullmatch(name):
        data = bytes([int(match[1], 16)])
    elif name and all(letter in _BYTES for letter in name):
        data = bytes(_BYTES[letter] for letter in name)
    else:
        return None
    return data.decode("utf-8", "surrogateescape")
