"""Texts that a row must not say, as sequences of tokens.

A word is made into tokens as vLLM does it: without the space before it, and with one. The second form counts where it
begins with another token and is as long, which is how tokenizers tell a word inside a text from one at its beginning. A
sequence is forbidden by making its last token impossible where the text generated so far ends with those before it; the
prompt is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from batchgen.models.tokenizer import HfTokenizer


def find_sequences(words: Iterable[str], tokenizer: HfTokenizer) -> list[list[int]]:
    """Returns the sequences of tokens that these words stand for, none of them empty."""
    found: list[list[int]] = []
    for word in words:
        bare, spaced = map(list, tokenizer.tokenize([word.lstrip(), " " + word.lstrip()], special=False))
        if bare:
            found.append(bare)
        if spaced and (not bare or (len(spaced) == len(bare) and spaced[0] != bare[0])):
            found.append(spaced)
    return found


def find_forbidden(sequences: Sequence[Sequence[int]], generated: Sequence[int]) -> list[int]:
    """Returns the tokens that would complete one of these sequences, of two tokens or more, behind `generated`."""
    return [sequence[-1] for sequence in sequences if list(generated[-(len(sequence) - 1) :]) == list(sequence[:-1])]
