"""What a forward computes, and for which sequences. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.types import Prompt

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How large steps and their sequences may be."""

    slots: int  # most sequences that run at once
    sequence_tokens: int  # most tokens of a sequence, prompt and generation
    step_tokens: int  # most tokens of a step with prefill chunks in it

    @property
    def columns(self) -> int:
        """Most pages of a sequence: the width of the block table."""
        return -(-self.sequence_tokens // PAGE_SIZE)


class Sequence:
    """One prompt on its way."""

    __slots__ = (
        "admission",
        "logprobs",
        "max_new_tokens",
        "pages",
        "planned_tokens",
        "prefix",
        "prompt",
        "prompt_tokens",
        "random",
        "slot",
        "tokens",
    )

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.tokens = list(prompt.tokens)  # those of the prompt, then those that have been generated
        self.prompt_tokens = len(prompt.tokens)
        self.logprobs: list[float] | None = [] if prompt.params.logprobs else None  # of the generated ones, if wanted
        self.max_new_tokens = prompt.params.max_new_tokens
        self.slot = -1  # its row of the block table; -1: it does not run
        self.pages: list[int] = []
        self.planned_tokens = 0  # those of `tokens` that are in the cache once the planned steps have run
        self.prefix = 0  # the node of `Pages` that stands for those of them that fill pages
        self.admission = 0  # its number in the order of admission
        self.rewind_random()

    @property
    def generated_tokens(self) -> int:
        """How many generated tokens have been read."""
        return len(self.tokens) - self.prompt_tokens

    def rewind_random(self) -> None:
        """Makes the next random number that of the token behind those that have been read."""
        self.random = Random(self.prompt.row_seed)
        for _ in self.tokens[self.prompt_tokens :]:
            self.random.random()


@dataclass(slots=True)
class Chunk:
    """Consecutive tokens of one sequence whose prefill is part of a step."""

    first: int  # place of its first token among the step's tokens
    count: int  # of its tokens
    slot: int  # of its sequence
    length: int  # tokens of the sequence down to the chunk's end


@dataclass(slots=True)
class Step:
    """One forward. First come sequences that decode, a token each, then prefill chunks."""

    slots: Ints  # [tokens]: the slot of each token's sequence
    positions: Ints  # [tokens]: its position in the sequence
    ids: Ints  # [tokens]; -1: the token that the step before has chosen for this slot
    decoding: int  # how many of the tokens decode
    chunks: list[Chunk]
    rows: Ints  # [rows]: the places of the tokens whose logits are wanted
    sequences: list[Sequence]  # of those rows; none where another rank has planned the step
    is_sampled: bool  # whether the next token of one of those rows is drawn
    logprob_rows: list[int]  # places among those rows of the ones whose log-probability is wanted
    table_places: NDArray[np.int64]  # [changes]: places in the flattened block table that change before this step
    table_pages: Ints  # [changes]: the pages that they become

    def pack(self) -> NDArray[np.int64]:
        """All of it but the sequences, as one row of numbers."""
        numbers = [(chunk.first, chunk.count, chunk.slot, chunk.length) for chunk in self.chunks]
        chunks = np.array(numbers, np.int64).reshape(-1)
        logprob_rows = np.array(self.logprob_rows, np.int64)
        fields = (
            self.slots,
            self.positions,
            self.ids,
            chunks,
            self.rows,
            logprob_rows,
            self.table_places,
            self.table_pages,
        )
        head = np.array([self.decoding, self.is_sampled, *(len(field) for field in fields)], np.int64)
        return np.concatenate([head, *fields])

    @classmethod
    def unpack(cls, numbers: NDArray[np.int64]) -> Step:
        """The step that `pack` has made numbers of, without its sequences."""
        decoding, is_sampled, *lengths = numbers[:10].tolist()
        fields = np.split(numbers[10:], np.cumsum(lengths)[:-1])
        slots, positions, ids, chunks, rows, logprob_rows, table_places, table_pages = fields
        return cls(
            slots.astype(np.int32),
            positions.astype(np.int32),
            ids.astype(np.int32),
            decoding,
            [Chunk(*chunk) for chunk in chunks.reshape(-1, 4).tolist()],
            rows.astype(np.int32),
            [],
            bool(is_sampled),
            logprob_rows.tolist(),
            table_places,
            table_pages.astype(np.int32),
        )


class StepDraft:
    """A step that is being planned."""

    def __init__(self) -> None:
        self.tokens = 0  # so far
        self._decoding = 0
        self._slots: list[Ints] = []
        self._positions: list[Ints] = []
        self._ids: list[Ints] = []
        self._chunks: list[Chunk] = []
        self._rows: list[int] = []
        self._sequences: list[Sequence] = []

    def decode(self, sequences: list[Sequence], slots: Ints, positions: Ints) -> None:
        """Adds the next token of each of these sequences."""
        self._append(slots, positions, np.full(len(slots), -1, np.int32))
        self._decoding = self.tokens
        self._rows += range(self.tokens)
        self._sequences += sequences

    def prefill(self, sequence: Sequence, begin: int, end: int) -> None:
        """Adds tokens `begin` to `end` of a sequence; after its last token the next one is wanted."""
        count = end - begin
        self._chunks.append(Chunk(self.tokens, count, sequence.slot, end))
        ids = np.array(sequence.tokens[begin:end], np.int32)
        self._append(np.full(count, sequence.slot, np.int32), np.arange(begin, end, dtype=np.int32), ids)
        if end == len(sequence.tokens):
            self._rows.append(self.tokens - 1)
            self._sequences.append(sequence)

    def _append(self, slots: Ints, positions: Ints, ids: Ints) -> None:
        self._slots.append(slots)
        self._positions.append(positions)
        self._ids.append(ids)
        self.tokens += len(slots)

    def build(self, table_places: list[int], table_pages: list[int]) -> Step:
        """The step, with the changes of the block table that it needs."""
        return Step(
            np.concatenate(self._slots),
            np.concatenate(self._positions),
            np.concatenate(self._ids),
            self._decoding,
            self._chunks,
            np.array(self._rows, np.int32),
            self._sequences,
            any(sequence.prompt.params.temperature > 0 for sequence in self._sequences),
            [row for row, sequence in enumerate(self._sequences) if sequence.logprobs is not None],
            np.array(table_places, np.int64),
            np.array(table_pages, np.int32),
        )
