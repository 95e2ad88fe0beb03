"""The values that cross modules. Standard library only, no I/O.

A `Row` is one input row as a format read it; `prompts` turns it into a `Prompt` or, if something is wrong with it,
into a failed `Generation`. An engine turns prompts into a `Batch` of generations; `checkpoint` writes it and keeps a
`BatchRecord`, the proof that the batch is finished.

Once made, nobody changes these values. Those that a run makes for every row are not marked frozen all the same: making
a frozen one takes three times as long, which is felt with a million rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal


class UserError(Exception):
    """What the person at the terminal can mend: the text is a sentence that says what is wrong and what to do."""


class ExitCode(IntEnum):
    """How a command of batchgen ends. Click's own 1 and 2 say nothing about a run, so no outcome of one uses them."""

    ALL_GOOD = 0
    SOME_FAILED = 3  # the run is finished, and some rows have failed
    CANNOT_RUN = 4  # the person at the terminal must change something
    RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Shard:
    """Every `count`-th row from row `index` on, so that long and short parts of a file are shared out evenly.

    All rows by default. Written "3/8".

    Raises:
        ValueError: the index is not from 0 to below the count.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"there is no shard {self}: of N, the first is 0/N and the last N-1/N")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that is written `text`.

        Raises:
            ValueError: it is not written like 3/8.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if match is None:
            raise ValueError(f"{text!r} is no shard: write it like 3/8, the first of 8 being 0/8")
        return cls(int(match[1]), int(match[2]))

    def split(self, index: int, count: int) -> Shard:
        """Part `index` of `count` of this one."""
        return Shard(self.index + self.count * index, self.count * count)

    def rows(self, total: int) -> range:
        """Its row numbers in an input of `total` rows."""
        return range(self.index, total, self.count)

    def overlaps(self, other: Shard) -> bool:
        """Whether a row can be in both: rows that are i modulo n and j modulo m exist if gcd(n, m) divides i - j."""
        return (self.index - other.index) % math.gcd(self.count, other.count) == 0


_END = 2**31  # of what devices count with 32 bits

MACHINE_ERRORS = ("out_of_memory", "not_finite", "engine")
"""Types of what a row has met at work: another start may not, on a larger machine or with another engine."""

FIT = _END - 1
"""As many new tokens as the model's context leaves behind the prompt; no prompt that an engine sees has it."""
CANNOT_WRITE = "cannot write to"
"""How the reason of an attempt begins that has ended for a full or failing disk."""

TOO_MANY_FAILED = "more than --max-error-rate allows"
"""Part of the reason of an attempt that has ended for it."""

WHOLE = Shard()
"""All rows."""


Tokens = Sequence[int]
"""Token ids of one text, in order; no padding."""


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued. Greedy unless `temperature` is above 0.

    Frozen but not slotted: the command line reads each default off the class.

    Raises:
        ValueError: a value is out of range; the message names the field and the rule.
    """

    max_new_tokens: int = 128  # FIT: as many as the context leaves
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    seed: int = 0
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    logprobs: bool = False  # give the log-probability of every generated token (`likelihood`)

    def __post_init__(self) -> None:
        _check(
            _is_int(self.max_new_tokens) and self.max_new_tokens >= 1,
            "max_new_tokens must be a whole number, 1 or more",
        )
        _check(self.max_new_tokens < _END, f"max_new_tokens must be below {_END}")
        _check(
            _is_number(self.temperature) and 0 <= self.temperature <= 100, "temperature must be a number from 0 to 100"
        )
        _check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p must be a number above 0 and at most 1")
        _check(_is_int(self.top_k) and self.top_k >= 0, "top_k must be a whole number, 0 (off) or more")
        _check(self.top_k < _END, f"top_k must be below {_END}")
        _check(_is_int(self.seed), "seed must be a whole number")
        _check(
            isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop),
            "stop must be a text or a list of texts, none of them empty",
        )
        _check(isinstance(self.logprobs, bool), "logprobs must be true or false")


PARAMS = frozenset(param.name for param in dataclasses.fields(SamplingParams))
"""What a row may set for itself."""


def _check(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(slots=True)
class RowError:
    """What is wrong with one row: a plain sentence for the person who wrote it."""

    type: str  # malformed_json, missing_prompt, wrong_type, too_long, duplicate_id, template, out_of_memory …
    """One of `MACHINE_ERRORS`, or the input's own fault."""
    message: str
    line: int  # of its file, counted from 1; for Parquet and Arrow, the row of the file counted from 1
    id: str | None = None  # what the row calls itself, where that can be read all the same


@dataclass(slots=True)
class Row:
    """One input row as its format read it."""

    index: int  # row number over the whole input, from 0
    source: str  # the file's name, unique within the input
    line: int  # as in RowError
    value: Mapping[str, object] | RowError  # the columns, or why they could not be read
    has_every_key: bool = field(default=False, compare=False)
    """Its format forces every object to have every key, so null means "not given". Rows are the same in any format."""


@dataclass(slots=True)
class Prompt:
    """One row, ready for a model."""

    index: int  # the row's
    id: str
    line: int
    text: str  # rendered, as the tokens were made from it; empty where the row brought token ids
    tokens: Tokens  # special tokens included
    params: SamplingParams
    columns: Mapping[str, object]  # the row's own columns, its id among them, carried to the output
    request: Mapping[str, object] | None = None  # the OpenAI batch line it came from, if it is one

    @property
    def row_seed(self) -> int:
        """Seed of this prompt's sampling: 64 bits of SHA-256 over the seed and the id.

        It depends neither on the row's position nor on the rank, so that another number of streams or a resume
        samples the same.
        """
        digest = hashlib.sha256(f"{self.params.seed}:{self.id}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big")


@dataclass(slots=True)
class Generation:
    """What became of one row: a text, or an error."""

    index: int
    id: str
    text: str | None  # decoded without special tokens, the prompt not included; None with an error
    finish_reason: FinishReason | None  # None with an error
    prompt_tokens: int
    generated_tokens: int  # up to and including the end-of-sequence token; padding never
    error: RowError | None
    columns: Mapping[str, object]
    request: Mapping[str, object] | None = None
    logprobs: Sequence[float] | None = None  # of each generated token, see `likelihood`; None: nobody asked
    token_texts: Sequence[str] | None = None  # of each, beside the logprobs of an OpenAI request, whose answer has them

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        text: str,
        finish_reason: FinishReason,
        generated_tokens: int,
        logprobs: Sequence[float] | None = None,
        token_texts: Sequence[str] | None = None,
    ) -> Generation:
        """The finished generation of `prompt`."""
        return cls(
            prompt.index,
            prompt.id,
            text,
            finish_reason,
            len(prompt.tokens),
            generated_tokens,
            None,
            prompt.columns,
            prompt.request,
            logprobs,
            token_texts,
        )

    @classmethod
    def failed(cls, prompt: Prompt, type: str, message: str) -> Generation:
        """`prompt`, refused by the engine (it does not fit into memory, say); the next start tries it again."""
        error = RowError(type, message, prompt.line)
        return cls(prompt.index, prompt.id, None, None, len(prompt.tokens), 0, error, prompt.columns, prompt.request)


@dataclass(frozen=True, slots=True)
class Batch:
    """What an engine hands over at once: generations finished together."""

    generations: Sequence[Generation]
    padded_tokens: int = 0  # token positions computed for padding, in prompts and in rows that had ended
    peak_memory_bytes: int | None = None  # of the device since the batch before; without a device, of the process
    share_of_bound: float | None = None  # of what the path that offloaded weights come over allows; None: no offload
    at_once: int | None = None  # rows that the device has had in work together, at most; None: those of this batch


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
