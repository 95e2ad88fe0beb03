"""Rows that finished together, and the record of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchgen.types.rows import Generation


@dataclass(frozen=True, slots=True)
class Batch:
    """What an engine hands over at once: generations finished together."""

    generations: Sequence[Generation]
    padded_tokens: int = 0  # token positions computed for padding, in prompts and in rows that had ended
    peak_memory_bytes: int | None = None  # of the device since the batch before; without a device, of the process
    share_of_bound: float | None = None  # of what the path that offloaded weights come over allows; None: no offload
    at_once: int | None = None  # rows that the device has had in work together, at most; None: those of this batch
    repeated_tokens: int = 0  # of samples that repeat another one's text, and were not generated
    incomplete: Sequence[int] = ()  # the row numbers of texts that their length cut before their constraint was met


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """The timing of one finished batch, and its place in the generations file: the commit record."""

    seconds: float  # since the record before it in this stream, or since the engine was ready
    prompts: int
    prompt_tokens: int
    generated_tokens: int
    padded_tokens: int
    tokens_per_second: float  # generated_tokens / seconds
    peak_memory_bytes: int | None
    attempt: int
    rank: int
    first: bool  # the stream's first batch: compilation and allocator warm-up are in it
    finished: float  # Unix time
    begin: int  # bytes begin..end of the generations file hold this batch, one line a row
    end: int
    rows: Sequence[int]  # the row numbers of those lines, in their order
    failed: Sequence[int]  # those of them that are error rows
    checksum: int  # CRC-32 of those bytes
    share_of_bound: float | None = None  # as in Batch
    incomplete: Sequence[int] = ()  # as in Batch
    reasoning_tokens: int = 0  # of the generated tokens, of models that think
