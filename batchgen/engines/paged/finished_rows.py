"""Rows that have ended: how they are found in the tokens of a step, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from batchgen.engine import SignsOfLife
from batchgen.engines.paged.launched_step import LaunchedStep
from batchgen.engines.paged.runner import NOT_FINITE
from batchgen.engines.paged.scheduler import Scheduler
from batchgen.engines.paged.step import Sequence
from batchgen.generation import finite, refusals
from batchgen.generation.choosing import TokenChooser
from batchgen.generation.chosen import ChosenLogprob, TokenLogprobs
from batchgen.generation.stopping import StopTexts, generation
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Generation, Prompt


@dataclass(frozen=True, slots=True)
class FinishedRow:
    """A row that has ended."""

    prompt: Prompt
    tokens: list[int] | None  # generated, up to and including the one that ended it; None: it has failed
    is_stopped: bool = False  # by an end of sequence or a stop text, not by its length
    logprobs: list[float] | None = None  # of `tokens`, if the prompt asks for them
    is_not_finite: bool = False  # why it has failed: the model's numbers; else there is no room for it

    def to_generation(self, tokenizer: HfTokenizer, dtype: str) -> Generation:
        """The row's text, or its error; `dtype` is what the model computes in, as `--dtype` calls it."""
        if self.is_not_finite:
            return finite.fail(self.prompt, dtype)
        if self.tokens is None:
            return refusals.refuse(self.prompt)
        return generation(self.prompt, self.tokens, self.is_stopped, tokenizer, self.logprobs)


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
        self._stop_texts: dict[Sequence, StopTexts] = {}
        self._logprobs: dict[Sequence, list[ChosenLogprob]] = {}
        self._prompt_logprobs: dict[Sequence, list[ChosenLogprob]] = {}
        self.has_read = False  # the tokens of a step

    def read(self, launched: LaunchedStep) -> list[FinishedRow]:
        """Waits for the tokens of a step and gives them to their sequences; the rows that have ended."""
        step, tokens = launched.step, launched.read_tokens()
        self.has_read = True
        self._read_prompt_logprobs(launched)
        self._read_logprobs(launched)
        if step.is_chosen:
            pairs = zip(step.sequences, tokens, strict=True)
            self._chooser.advance({s.slot: token for s, token in pairs if s.awaits_tokens and s.slot >= 0 <= token})
        finished: list[FinishedRow] = []
        end_tokens, count = self._end_tokens, 0
        for sequence, token in zip(step.sequences, tokens, strict=True):
            if sequence.slot < 0:
                continue  # it ended in the step before, when this one had been launched
            if token < 0:
                self._end(sequence)
                finished.append(FinishedRow(sequence.prompt, None, is_not_finite=token == NOT_FINITE))
                continue
            sequence.tokens.append(token)
            count += 1
            is_stopped = token in end_tokens or (bool(sequence.prompt.params.stop) and self._stops(sequence, token))
            if is_stopped or len(sequence.tokens) == sequence.prompt_tokens + sequence.max_new_tokens:
                generated = sequence.tokens[sequence.prompt_tokens :]
                found = self._logprobs.get(sequence)
                logprobs = None if found is None else [one.logprob for one in found]
                self._end(sequence)
                finished.append(FinishedRow(sequence.prompt, generated, is_stopped, logprobs))
        self._signs.generated_tokens += count
        return finished

    def _read_logprobs(self, launched: LaunchedStep) -> None:
        """Gives the log-probabilities of chosen tokens to the sequences that asked, those that have ended left out."""
        if launched.logprobs is None:
            return
        for row, found in zip(launched.logprobs.rows, _read(launched.logprobs), strict=True):
            if launched.step.sequences[row].slot >= 0:
                self._logprobs.setdefault(launched.step.sequences[row], []).append(found)

    def _read_prompt_logprobs(self, launched: LaunchedStep) -> None:
        """The same of prompts; one that is computed again from its beginning is read again, too."""
        found = chain.from_iterable(map(_read, launched.prompt_logprobs))
        for part in launched.step.prompt_parts:
            before = [] if part.begin == 1 else self._prompt_logprobs[part.sequence]
            self._prompt_logprobs[part.sequence] = [*before, *islice(found, part.end - part.begin)]
            part.sequence.has_prompt_logprobs = part.end == part.sequence.prompt_tokens

    def _end(self, sequence: Sequence) -> None:
        self._chooser.end(sequence.slot)
        self._scheduler.finish(sequence)
        for kept in (self._stop_texts, self._logprobs, self._prompt_logprobs):
            kept.pop(sequence, None)

    def _stops(self, sequence: Sequence, token: int) -> bool:
        """Whether the token completes one of the row's stop texts."""
        texts = self._stop_texts.get(sequence)
        if texts is None:
            texts = self._stop_texts[sequence] = StopTexts.of([sequence.prompt], self._tokenizer)
        return bool(texts.append([token]))


def _read(found: TokenLogprobs) -> Iterator[ChosenLogprob]:
    numbers = (found.logprobs, found.top_ids, found.top_logprobs)
    return map(ChosenLogprob, *(values.tolist() for values in numbers))
