"""What a forward computes, and for which sequences. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from batchgen.engines.paged.pages import PAGE_SIZE, ROOT
from batchgen.generation import ends
from batchgen.generation.choosing import needs_chooser
from batchgen.types import Prompt

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How large steps and their sequences may be."""

    slots: int  # most sequences that run at once
    sequence_tokens: int  # most tokens of a sequence, prompt and generation
    step_tokens: int  # most tokens of a step with prefill chunks in it
    # Keys of prompts beyond it have other positions than the same tokens in a shorter one; None: they have the same.
    original_context: int | None = None
    adapters: tuple[str, ...] = ()  # the names of those that sequences may have; their numbers count from 1
    kv_dtype: str = "auto"  # of the cache: fp8, or auto, that of the model

    @property
    def columns(self) -> int:
        """Most pages of a sequence."""
        return -(-self.sequence_tokens // PAGE_SIZE)

    @property
    def table_width(self) -> int:
        """The width of a block table: the pages of a sequence, its adapter, and how many tokens its prompt has."""
        return self.columns + 2

    def find_adapter(self, name: str) -> int:
        """Returns the number of the adapter that a prompt names; 0: it names none."""
        return self.adapters.index(name) + 1 if name else 0

    def is_long(self, prompt_tokens: int) -> bool:
        """Whether a prompt goes beyond the original context."""
        return self.original_context is not None and prompt_tokens > self.original_context


class Sequence:
    """One prompt on its way."""

    __slots__ = (
        "adapter",
        "admission",
        "awaits_tokens",
        "has_own_ends",
        "has_prompt_logprobs",
        "max_new_tokens",
        "needs_chooser",
        "planned_tokens",
        "prefix",
        "prompt",
        "prompt_tokens",
        "slot",
        "tokens",
    )

    def __init__(self, prompt: Prompt, adapter: int = 0) -> None:
        self.prompt = prompt
        self.adapter = adapter  # its number, from 1; 0: none
        self.tokens = list(prompt.tokens)  # those of the prompt, then those that have been generated
        self.prompt_tokens = len(prompt.tokens)
        self.max_new_tokens = prompt.params.max_new_tokens
        self.needs_chooser = needs_chooser(prompt)  # more is wanted of its logits than the place of the largest
        self.awaits_tokens = False  # whether its last token has to be read before the next is chosen, once it has begun
        self.has_own_ends = ends.needs_tokens(prompt)  # besides its length and the model's ends of sequence
        # Those of the prompt have been read, or nobody asks for any.
        self.has_prompt_logprobs = prompt.params.prompt_logprobs is None or self.prompt_tokens < 2
        self.slot = -1  # its row of the block tables; -1: it does not run
        self.planned_tokens = 0  # those of `tokens` that are in the cache once the planned steps have run
        self.prefix = ROOT  # the node of `Pages` that stands for those of them that fill pages
        self.admission = 0  # its number in the order of admission

    @property
    def generated_tokens(self) -> int:
        """How many generated tokens have been read."""
        return len(self.tokens) - self.prompt_tokens


@dataclass(slots=True)
class Chunk:
    """Consecutive tokens of one sequence whose prefill is part of a step."""

    first: int  # place of its first token among the step's tokens
    count: int  # of its tokens
    slot: int  # of its sequence
    length: int  # tokens of the sequence down to the chunk's end


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Consecutive tokens of a prompt whose log-probabilities a step finds: each follows from the token before it."""

    sequence: Sequence
    begin: int  # position of the first of them, 1 or more
    end: int  # behind the last of them


@dataclass(slots=True)
class Step:
    """One forward. First come sequences that decode, a token each, then prefill chunks."""

    slots: Ints  # [tokens]: the slot of each token's sequence
    positions: Ints  # [tokens]: its position in the sequence
    ids: Ints  # [tokens]; -1: the token that the step before has chosen for this slot
    decoding: int  # how many of the tokens decode
    chunks: list[Chunk]
    rows: Ints  # [rows]: the places of the tokens behind which the next one is wanted
    prompt_rows: Ints  # [prompt rows]: the places of the tokens of prompts whose logits are wanted, see `PromptPart`
    needs_chooser: bool  # of some of these rows more is wanted than the best token: one rank chooses, for all of them
    has_adapters: bool  # some of the tokens are of a sequence with an adapter
    table_places: NDArray[np.int64]  # [changes]: places in the flattened block tables that change before this step
    table_pages: Ints  # [changes]: the pages that they become
    # The rest is known where the step was planned, and empty on the other ranks.
    sequences: list[Sequence] = field(default_factory=list)  # of `rows`; the first `decoding` of them decode
    prompt_parts: list[PromptPart] = field(default_factory=list)  # in the order of `prompt_rows`

    def pack(self) -> NDArray[np.int64]:
        """What the other ranks must know of it, as one row of numbers."""
        numbers = [(chunk.first, chunk.count, chunk.slot, chunk.length) for chunk in self.chunks]
        chunks = np.array(numbers, np.int64).reshape(-1)
        fields = (
            self.slots,
            self.positions,
            self.ids,
            chunks,
            self.rows,
            self.prompt_rows,
            self.table_places,
            self.table_pages,
        )
        head = np.array(
            [self.decoding, self.needs_chooser, self.has_adapters, *(len(field) for field in fields)], np.int64
        )
        return np.concatenate([head, *fields])

    @classmethod
    def unpack(cls, numbers: NDArray[np.int64]) -> Step:
        """The step that `pack` has made numbers of, without its sequences."""
        decoding, needs_chooser, has_adapters, *lengths = numbers[:11].tolist()
        fields = np.split(numbers[11:], np.cumsum(lengths)[:-1])
        slots, positions, ids, chunks, rows, prompt_rows, table_places, table_pages = fields
        return cls(
            slots.astype(np.int32),
            positions.astype(np.int32),
            ids.astype(np.int32),
            decoding,
            [Chunk(*chunk) for chunk in chunks.reshape(-1, 4).tolist()],
            rows.astype(np.int32),
            prompt_rows.astype(np.int32),
            bool(needs_chooser),
            bool(has_adapters),
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
        self._prompt_rows: list[int] = []
        self._prompt_parts: list[PromptPart] = []

    def decode(self, sequences: list[Sequence], slots: Ints, positions: Ints) -> None:
        """Adds the next token of each of these sequences."""
        self._append(slots, positions, np.full(len(slots), -1, np.int32))
        self._decoding = self.tokens
        self._rows += range(self.tokens)
        self._sequences += sequences

    def prefill(self, sequence: Sequence, begin: int, end: int) -> None:
        """Adds tokens `begin` to `end` of a sequence; after its last token the next one is wanted."""
        count = end - begin
        if not sequence.has_prompt_logprobs and (last := min(end, sequence.prompt_tokens - 1)) > begin:
            self._prompt_rows += range(self.tokens, self.tokens + last - begin)
            self._prompt_parts.append(PromptPart(sequence, begin + 1, last + 1))
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

    def build(self, table_places: NDArray[np.int64], table_pages: Ints, adapters: Ints) -> Step:
        """The step, with the changes of the block tables that it needs.

        Args:
            adapters: of the sequence in each slot, [slots].
        """
        slots = np.concatenate(self._slots)
        return Step(
            slots,
            np.concatenate(self._positions),
            np.concatenate(self._ids),
            self._decoding,
            self._chunks,
            np.array(self._rows, np.int32),
            np.array(self._prompt_rows, np.int32),
            any(sequence.needs_chooser for sequence in self._sequences),
            bool(adapters[slots].any()),
            table_places,
            table_pages,
            self._sequences,
            self._prompt_parts,
        )
