"""Names of tokens that are parts of characters, in both ways in which vocabularies write them."""

from __future__ import annotations

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from batchgen.models.byte_tokens import decode_parts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("<0xE2>", "\udce2"),
        ("<0x41>", "A"),
        ("ĠcafÃ", " caf\udcc3"),
        ("Ã©", "é"),
        ("ï¿½", "\ufffd"),
        ("▁a", None),
        ("", None),
        ("<0xE2>▁", None),
    ],
)
def test_the_bytes_of_a_token_are_read_off_its_name(name: str, text: str | None) -> None:
    assert decode_parts(name) == text


def test_every_byte_has_a_letter_as_tokenizers_has_it() -> None:
    letters = sorted(ByteLevel.alphabet())
    decoded = b"".join((decode_parts(letter) or "").encode("utf-8", "surrogateescape") for letter in letters)
    assert sorted(decoded) == list(range(256))
