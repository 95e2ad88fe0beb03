"""Rows that have ended: how they are found in the tokens of a step, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from itertools import islice
from typing import Any

import torch

from batchgen.engine import SignsOfLife
from batchgen.engines.paged.forward import NOT_FINITE
from batchgen.engines.paged.launched_step import LaunchedStep
from batchgen.engines.paged.scheduler import Scheduler
from batchgen.engines.paged.step import Sequence
from batchgen.generation import finite, refusals, results
from batchgen.generation.choice import NOTHING_LEFT, ChosenLogprob
from batchgen.generation.choosing import TokenChooser
from batchgen.generation.ends import LENGTH, STOP, End, EndFinder
from batchgen.generation.prompt_logprobs import PromptLogprobs
from batchgen.generation.results import Ended
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Generation, Prompt, Tokens


class Failure(Enum):
    """Why a row has failed."""

    NO_ROOM = auto()  # in the cache, even alone
    NOT_FINITE = auto()  # the model's numbers
    NO_TOKEN = auto()  # that its parameters allow
    CONSTRAINT = auto()  # could not be followed


@dataclass(frozen=True, slots=True)
class FinishedRow:
    """A row that has ended."""

    prompt: Prompt
    ended: Ended | None  # None: it has failed
    failure: Failure | None = None  # None: it has not
    reason: str = ""  # why its constraint could not be followed

    @property
    def tokens(self) -> Tokens | None:
        """Those that were generated, up to and including the one that ended the row; None: it has failed."""
        return None if self.ended is None else self.ended.tokens

    def to_failure(self, dtype: str) -> Generation:
        """The row's error; `dtype` is what the model computes in, as `--dtype` calls it."""
        if self.failure is Failure.NOT_FINITE:
            return finite.fail(self.prompt, dtype)
        if self.failure is Failure.NO_TOKEN:
            return results.fail_impossible(self.prompt)
        if self.failure is Failure.CONSTRAINT:
            return results.fail_constraint(self.prompt, self.reason)
        return refusals.refuse(self.prompt)


def make_generations(rows: Iterable[FinishedRow], tokenizer: HfTokenizer, dtype: str) -> list[Generation]:
    """The text of each row, or its error; `dtype` is what the model computes in, as `--dtype` calls it."""
    rows = list(rows)
    made = iter(results.make_generations([row.ended for row in rows if row.ended is not None], tokenizer))
    return [row.to_failure(dtype) if row.ended is None else next(made) for row in rows]


class StepReader:
    """Reads the tokens of steps, and finds the rows that they end.

    Args:
        scheduler: whose sequences get these tokens; it is told which of them end.
        tokenizer: of the model: it has the tokens that end a row, and makes texts, in which stop texts are looked for.
        chooser: of the tokens: it is told those that rows await, and which rows end.
        signs: count the tokens.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: HfTokenizer, chooser: TokenChooser, signs: SignsOfLife) -> None:
        self._scheduler, self._tokenizer, self._chooser, self._signs = scheduler, tokenizer, chooser, signs
        self._end_tokens = frozenset(tokenizer.end_tokens)
        # Of the sequences that need them, until they end.
        self._finders: dict[Sequence, EndFinder] = {}
        self._logprobs: dict[Sequence, list[ChosenLogprob]] = {}
        self._prompt_logprobs: dict[Sequence, list[tuple[Any, ...]]] = {}  # a row of `PromptLogprobs` for each token
        self.has_read = False  # the tokens of a step

    def read(self, launched: LaunchedStep) -> list[FinishedRow]:
        """Waits for the tokens of a step and gives them to their sequences; the rows that have ended."""
        step, tokens = launched.step, launched.read_tokens()
        self.has_read = True
        self._read_prompt_logprobs(launched)
        self._read_logprobs(launched)
        finished: list[FinishedRow] = []
        ends: dict[Sequence, End] = {}
        count = 0
        for sequence, token in zip(step.sequences, tokens, strict=True):
            if sequence.slot < 0:
                continue  # it ended in the step before, when this one had been launched
            if token < 0:
                finished.append(self._fail(sequence, token))
                continue
            sequence.tokens.append(token)
            count += 1
            if (end := self._find_end(sequence, token)) is not None:
                ends[sequence] = end
        if step.needs_chooser:
            pairs = zip(step.sequences, tokens, strict=True)
            finished += self._advance([pair for pair in pairs if pair[0].awaits_tokens and pair[0].slot >= 0], ends)
        self._signs.generated_tokens += count
        return finished + [self._end(sequence, end) for sequence, end in ends.items()]

    def _find_end(self, sequence: Sequence, token: int) -> End | None:
        """Why a sequence ends with its next token, as far as its text says; None: it does not."""
        if sequence.has_own_ends:
            if sequence not in self._finders:
                self._finders[sequence] = EndFinder(sequence.prompt, self._tokenizer)
            return self._finders[sequence].append(token)
        if token in self._end_tokens:
            return STOP
        return LENGTH if len(sequence.tokens) == sequence.prompt_tokens + sequence.max_new_tokens else None

    def _advance(self, awaiting: list[tuple[Sequence, int]], ends: dict[Sequence, End]) -> list[FinishedRow]:
        """Gives the chooser the tokens that rows await, unless they have ended with them.

        Args:
            ends: why sequences end; those whose constraint lets nothing follow are added, and those that fail are
                taken out.

        Returns:
            The rows whose constraint could not be followed.
        """
        # Whether a constraint is met also matters to a row that is as long as it may be, or that has ended by itself.
        going_on = [(sequence, token) for sequence, token in awaiting if ends.get(sequence, LENGTH) in (LENGTH, STOP)]
        self._chooser.advance({sequence.slot: token for sequence, token in going_on})
        failed = []
        for sequence, _ in awaiting:
            sequence.awaits_tokens = self._chooser.awaits_tokens(sequence.slot)  # not when its thinking is over, say
            # llguidance lets a text that cannot be completed end: it is no text by the constraint.
            if self._chooser.find_error(sequence.slot) is not None:
                ends.pop(sequence, None)
                failed.append(self._fail(sequence))
            elif ends.get(sequence, LENGTH) is LENGTH and self._chooser.is_complete(sequence.slot):
                ends[sequence] = STOP
        return failed

    def _end(self, sequence: Sequence, end: End) -> FinishedRow:
        prompt, generated = sequence.prompt, sequence.tokens[sequence.prompt_tokens :]
        prompt_logprobs = None
        if prompt.params.prompt_logprobs is not None:
            prompt_logprobs = _join(self._prompt_logprobs.get(sequence, []), prompt.params.prompt_logprobs)
        ended = Ended(prompt, generated, end, self._logprobs.get(sequence), prompt_logprobs)
        self._release(sequence)
        return FinishedRow(prompt, ended)

    def _fail(self, sequence: Sequence, token: int = NOTHING_LEFT) -> FinishedRow:
        """Ends a row that has no next token: `token` says why, unless its constraint does."""
        reason = self._chooser.find_error(sequence.slot)
        self._release(sequence)
        if reason is not None:
            return FinishedRow(sequence.prompt, None, Failure.CONSTRAINT, reason)
        return FinishedRow(sequence.prompt, None, Failure.NOT_FINITE if token == NOT_FINITE else Failure.NO_TOKEN)

    def _release(self, sequence: Sequence) -> None:
        self._chooser.end(sequence.slot)
        self._scheduler.finish(sequence)
        for kept in (self._finders, self._logprobs, self._prompt_logprobs):
            kept.pop(sequence, None)

    def _read_logprobs(self, launched: LaunchedStep) -> None:
        """Gives the log-probabilities of chosen tokens to the sequences that asked, those that have ended left out."""
        if launched.logprobs is None:
            return
        found = launched.logprobs
        numbers = _read((found.logprobs, found.top_ids, found.top_logprobs))
        for row, *values in zip(found.rows, *numbers, strict=True):
            sequence = launched.step.sequences[row]
            if sequence.slot >= 0:
                self._logprobs.setdefault(sequence, []).append(ChosenLogprob(*values))

    def _read_prompt_logprobs(self, launched: LaunchedStep) -> None:
        """The same of prompts; one that is computed again from its beginning is read again, too."""
        if launched.prompt_logprobs is None:
            return
        found = zip(*_read(launched.prompt_logprobs), strict=True)
        for part in launched.step.prompt_parts:
            if part.begin == 1:
                self._prompt_logprobs[part.sequence] = []
            self._prompt_logprobs[part.sequence] += islice(found, part.end - part.begin)
            part.sequence.has_prompt_logprobs = part.end == part.sequence.prompt_tokens


def _read(tensors: Iterable[torch.Tensor]) -> Iterator[list[Any]]:
    return (values.tolist() for values in tensors)


def _join(tokens: list[tuple[Any, ...]], count: int) -> PromptLogprobs:
    """The numbers of a prompt's tokens, with `count` of the likeliest ones beside each."""
    columns = [(logprob, rank, ids[:count], top[:count]) for logprob, rank, ids, top in tokens]
    return PromptLogprobs(*map(list, zip(*columns, strict=True))) if columns else PromptLogprobs([], [], [], [])
