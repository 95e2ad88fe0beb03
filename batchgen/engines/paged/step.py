"""What a forward computes, and of which sequences. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from batchgen.types import Prompt

Ints = NDArray[np.int32]


class Sequence:
    """One prompt on its way."""

    __slots__ = (
        "admitted",
        "begin",
        "logprobs",
        "most",
        "node",
        "pages",
        "planned",
        "prompt",
        "random",
        "slot",
        "tokens",
    )

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.tokens = list(prompt.tokens)  # of the prompt, and generated
        self.begin = len(prompt.tokens)  # of the generated ones
        self.logprobs: list[float] | None = [] if prompt.params.logprobs else None  # of the generated ones, if asked
        self.most = prompt.params.max_new_tokens
        self.slot = -1  # its row in the table of pages; -1: it has none
        self.pages: list[int] = []
        self.planned = 0  # tokens of the prompt that are in the cache once the planned steps have run
        self.node = 0  # of `Pages`, of those of them that fill pages
        self.admitted = 0  # its number in the order of admission
        self.rewind()

    @property
    def done(self) -> int:
        """Generated tokens that are known."""
        return len(self.tokens) - self.begin

    def rewind(self) -> None:
        """Draws the next random number for the token behind those that are known."""
        self.random = Random(self.prompt.row_seed)
        for _ in self.tokens[self.begin :]:
            self.random.random()


@dataclass(slots=True)
class Part:
    """Consecutive tokens of one sequence in a step."""

    first: int  # of the step's tokens
    count: int
    slot: int
    length: int  # of the sequence, these tokens included


@dataclass(slots=True)
class Step:
    """One forward. First come sequences that decode, a token each, then parts of prompts."""

    slots: Ints  # [tokens], the sequence of each
    positions: Ints  # [tokens], its place in the sequence
    ids: Ints  # [tokens]; -1: the token that the step before has chosen for this slot
    decoding: int  # tokens of the first kind
    parts: list[Part]
    rows: Ints  # [rows], the tokens whose logits are wanted
    sequences: list[Sequence]  # of those rows; none where another rank has planned the step
    sampled: bool  # one of those rows draws its next token
    asked: list[int]  # those rows that ask for log-probabilities, by their place among them
    table_at: NDArray[np.int64]  # places of the table of pages, counted through, that change before this step
    table_to: Ints  # the pages there

    def packed(self) -> NDArray[np.int64]:
        """All of it but the sequences, as one row of numbers."""
        parts = np.array([(one.first, one.count, one.slot, one.length) for one in self.parts], np.int64).reshape(-1)
        asked = np.array(self.asked, np.int64)
        fields = (self.slots, self.positions, self.ids, parts, self.rows, asked, self.table_at, self.table_to)
        head = np.array([self.decoding, self.sampled, *(len(field) for field in fields)], np.int64)
        return np.concatenate([head, *fields])

    @classmethod
    def unpacked(cls, numbers: NDArray[np.int64]) -> Step:
        """The step that was `packed`, without its sequences."""
        decoding, sampled, *lengths = numbers[:10].tolist()
        slots, positions, ids, parts, rows, asked, table_at, table_to = np.split(numbers[10:], np.cumsum(lengths)[:-1])
        return cls(
            slots.astype(np.int32),
            positions.astype(np.int32),
            ids.astype(np.int32),
            decoding,
            [Part(*part) for part in parts.reshape(-1, 4).tolist()],
            rows.astype(np.int32),
            [],
            bool(sampled),
            asked.tolist(),
            table_at,
            table_to.astype(np.int32),
        )


class Draft:
    """A step in the making."""

    def __init__(self) -> None:
        self.count = 0
        self._decoding = 0
        self._slots: list[Ints] = []
        self._positions: list[Ints] = []
        self._ids: list[Ints] = []
        self._parts: list[Part] = []
        self._rows: list[int] = []
        self._sequences: list[Sequence] = []

    def decode(self, sequences: list[Sequence], slots: Ints, positions: Ints) -> None:
        """The next token of each."""
        self._append(slots, positions, np.full(len(slots), -1, np.int32))
        self._decoding = self.count
        self._rows += range(self.count)
        self._sequences += sequences

    def prefill(self, sequence: Sequence, begin: int, end: int) -> None:
        """Tokens `begin` to `end` of a sequence; behind its last one the next token is wanted."""
        count = end - begin
        self._parts.append(Part(self.count, count, sequence.slot, end))
        ids = np.array(sequence.tokens[begin:end], np.int32)
        self._append(np.full(count, sequence.slot, np.int32), np.arange(begin, end, dtype=np.int32), ids)
        if end == len(sequence.tokens):
            self._rows.append(self.count - 1)
            self._sequences.append(sequence)

    def _append(self, slots: Ints, positions: Ints, ids: Ints) -> None:
        self._slots.append(slots)
        self._positions.append(positions)
        self._ids.append(ids)
        self.count += len(slots)

    def made(self, table_at: list[int], table_to: list[int]) -> Step:
        """The step, with changes of the table of pages."""
        return Step(
            np.concatenate(self._slots),
            np.concatenate(self._positions),
            np.concatenate(self._ids),
            self._decoding,
            self._parts,
            np.array(self._rows, np.int32),
            self._sequences,
            any(sequence.prompt.params.temperature > 0 for sequence in self._sequences),
            [row for row, sequence in enumerate(self._sequences) if sequence.logprobs is not None],
            np.array(table_at, np.int64),
            np.array(table_to, np.int32),
        )
