"""One row on its way: as it was read, as a prompt, and as what became of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from batchgen.types.outcomes import FinishReason
from batchgen.types.params import SamplingParams

Tokens = Sequence[int]
"""Token ids of one text, in order; no padding."""


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


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a model marks what it thinks before it answers."""

    start: str  # as "<think>"
    end: str  # as "</think>"
    is_open: bool  # the prompt ends inside the thinking, so that the text begins with it


@dataclass(frozen=True, slots=True)
class Markup:
    """What a model may write beside the answer, by marks in its text.

    One that is shared by many prompts is one object.
    """

    thinking: Thinking | None = None  # None: it does not think
    tools: str | None = None  # the form of its calls of tools, a name of `requests.tools`; None: it has none to call


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
    sample: int = 0  # which of the row's texts an engine is to generate: `params.n` of this prompt, then of `others`
    markup: Markup | None = None  # what the model may write beside the answer; None: all of its text is the answer
    others: Sequence[Prompt] = ()  # the further prompts of the same row, each with this row's index and id
    adapter: str = ""  # the name of the adapter that the model has for this row; "": none

    @property
    def row_seed(self) -> int:
        """Seed of this prompt's sampling: 64 bits of SHA-256 over the seed, the id and the sample.

        It depends neither on the row's position nor on the rank, so that another number of streams or a resume
        samples the same. The first sample's is that of a row with one sample.
        """
        name = f"{self.params.seed}:{self.id}" + (f"\0{self.sample}" if self.sample else "")
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big")


class Alternative(NamedTuple):
    """A token that the model could have chosen, or has chosen, at some place."""

    token: int
    text: str  # as `HfTokenizer.token_text` gives it: bytes that are a part of a character are lone surrogates
    logprob: float
    rank: int  # among all tokens of the vocabulary at this place; the likeliest has 1


@dataclass(slots=True)
class Details:
    """What a row has asked to know beyond its text, or what was found in its text."""

    token_texts: Sequence[str] | None = None  # of each generated token, beside the logprobs of an OpenAI request
    prompt_token_texts: Sequence[str] | None = None
    """Of each token of the prompt of an OpenAI request that asks for its token ids or its log-probabilities."""
    token_ids: Sequence[int] | None = None  # those generated; None: nobody asked
    prompt_token_ids: Sequence[int] | None = None  # the same
    top_logprobs: Sequence[Sequence[Alternative]] | None = None  # of each generated token, the likeliest first
    prompt_logprobs: Sequence[Sequence[Alternative] | None] | None = None
    """Of each token of the prompt: the token itself, then the likeliest ones; None for the first, before which there is
    nothing."""
    stop_reason: str | int | None = None  # the stop text, or the id in `stop_token_ids`, that ended the text
    raw_text: str | None = None
    """All that the model wrote, special tokens included, where `Prompt.markup` says that it may be more than the
    answer."""
    reasoning_tokens: int | None = None  # of the generated tokens; None: the model has no form of thinking


@dataclass(slots=True)
class Generation:
    """What became of one row, or of one sample of it: a text, or an error."""

    index: int
    id: str
    text: str | None  # decoded without special tokens, the prompt not included; None with an error
    finish_reason: FinishReason | None  # None with an error
    prompt_tokens: int  # of a row with several prompts: of all of them
    generated_tokens: int  # up to and including the end-of-sequence token; padding never
    error: RowError | None
    columns: Mapping[str, object]
    request: Mapping[str, object] | None = None
    logprobs: Sequence[float] | None = None  # of each generated token, see `likelihood`; None: nobody asked
    details: Details | None = None  # None: there are none
    sample: int = 0  # which of the row's samples this is
    others: Sequence[Generation] = ()  # the samples after this one, in order, where the row has several
    markup: Markup | None = None  # the prompt's
    adapter: str = ""  # the prompt's

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        text: str,
        finish_reason: FinishReason,
        generated_tokens: int,
        logprobs: Sequence[float] | None = None,
        details: Details | None = None,
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
            details,
            prompt.sample,
            markup=prompt.markup,
            adapter=prompt.adapter,
        )

    @classmethod
    def failed(cls, prompt: Prompt, type: str, message: str) -> Generation:
        """`prompt`, refused by the engine (it does not fit into memory, say); the next start tries it again."""
        error = RowError(type, message, prompt.line)
        return cls(
            prompt.index,
            prompt.id,
            None,
            None,
            len(prompt.tokens),
            0,
            error,
            prompt.columns,
            prompt.request,
            sample=prompt.sample,
            adapter=prompt.adapter,
        )
