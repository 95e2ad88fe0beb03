"""A byte-level BPE tokenizer of any size, made up: the 256 bytes, and tokens that join two shorter ones, as a real one.

Most of the joined tokens are words and their parts (letters, with a space before some), the others digits, punctuation
that JSON is made of, white space and bytes of other scripts. So a mask over it costs about what it costs with a real
one.
"""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_MOST_LETTERS = 12
_SHORT = 2000  # of the tokens so far, from which the second half of a token is chosen


def save(folder: Path, size: int) -> None:
    """Writes a tokenizer of `size` tokens into `folder`; the last one is its end of sequence."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(bytes_)}
    merges: list[tuple[str, str]] = []
    choose = random.Random(1)
    words = [letter for letter in bytes_ if letter.isascii() and letter.isalpha()]
    marks = [letter for letter in bytes_ if letter.isascii() and not letter.isalpha()]
    others = [letter for letter in bytes_ if not letter.isascii()]
    while len(vocabulary) < size - 1:
        kind = choose.random()
        parts = words if kind < 0.7 else marks if kind < 0.85 else others
        left, right = choose.choice(parts), choose.choice(parts[:_SHORT])
        if parts is words and kind < 0.3:
            left = choose.choice(("Ġ", left)) if not left.startswith("Ġ") else left
        token = left + right
        if token in vocabulary or len(token) > _MOST_LETTERS:
            continue
        vocabulary[token] = len(vocabulary)
        merges.append((left, right))
        parts.append(token)
    vocabulary["<|end|>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
