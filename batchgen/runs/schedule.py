"""Which prompts, in which order. Pure functions; each stream computes its own part and asks nobody.

Shard first, then subtract what is done: the shard depends on the number of streams alone, so that a resume with another
number of streams loses and repeats nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from batchgen.engine import Stream
from batchgen.types import WHOLE, Prompt, Shard

# Rows read, tokenised and put in order at once: a hundred batches of ordinary size, and some tens of MB of token ids.
WINDOW = 2048
WINDOW_BYTES = 64 << 20  # of the input, unless one row has more: what is made of them takes several times as much


def shard(rows: int, stream: Stream, whole: Shard = WHOLE) -> range:
    """The row numbers of `stream` in `whole`, the part of the input that this start does."""
    return whole.split(stream.index, stream.count).rows(rows)


def open_rows(rows: range, is_good: Callable[[int], bool]) -> Iterator[int]:
    """The numbers among `rows` that have no generation yet, ascending. Rows that have failed are open again."""
    return (row for row in rows if not is_good(row))


def windows(
    rows: Iterable[int], bytes_of: Callable[[int], int], size: int = WINDOW, most_bytes: int = WINDOW_BYTES
) -> Iterator[Sequence[int]]:
    """`rows` in runs of `size`, or shorter so that they have `most_bytes` at most; one row may have more."""
    window: list[int] = []
    total = 0
    for row in rows:
        length = bytes_of(row)
        if window and total + length > most_bytes:
            yield window
            window, total = [], 0
        window.append(row)
        total += length
        if len(window) == size:
            yield window
            window, total = [], 0
    if window:
        yield window


def order(prompts: list[Prompt], window: int) -> list[Prompt]:
    """One window's prompts so that neighbours take equally long: by tokens to generate, then by length.

    The first window goes from long to short, so that what does not fit into memory shows at once; the next from short
    to long and so on, so that a batch across two windows has prompts of like length too.
    """
    return sorted(prompts, key=_work, reverse=window % 2 == 0)


def _work(prompt: Prompt) -> tuple[int, int]:
    return prompt.params.max_new_tokens, len(prompt.tokens)
