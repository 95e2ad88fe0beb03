"""What ranks that generate the same batches together have to agree on: their rows, and the token of each row."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from transformers import LogitsProcessor

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


class AgreedToken(LogitsProcessor):
    """Makes the token that the first of several ranks has chosen the only possible one on all of them.

    Their logits should be the same, bit by bit; if ever they are not, ranks that choose differently would end their
    rows at different steps, and would wait for each other for ever. It comes after all other processors.

    Args:
        take_first: overwrites token ids, [rows], with those of the first rank, and returns them (`Peers.tokens`).
    """

    def __init__(self, take_first: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._take_first = take_first

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        own = scores.argmax(-1)
        # A sampled token is marked by infinity, and may be another one than the first rank's.
        scores.scatter_(1, own[:, None], -torch.inf)
        return scores.scatter_(1, self._take_first(own)[:, None], torch.inf)
