"""What ranks that generate the same batches together have to agree on: their rows. `TokenChooser` has the tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from batchgen.engine import Died, Peers
from batchgen.types import Prompt


def check_equal_batches(peers: Peers, batch: Sequence[Prompt]) -> None:
    """Checks that all of `peers` are about to generate the same batch. All of them call it at the same time.

    Raises:
        Died: on all ranks, if their batches differ: together they would generate the text of neither.
    """
    digest = zlib.crc32(repr([(prompt.index, prompt.sample) for prompt in batch]).encode())
    if peers.any_rank(peers.least(digest) != digest):
        raise Died(
            "the ranks that share a model have not found the same rows finished, as if another process had "
            "recorded some meanwhile. Nothing wrong was generated; the same command goes on"
        )
