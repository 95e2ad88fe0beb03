"""Rows that have ended: how they are found in the tokens of a step, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass

from batchgen.engine import SignsOfLife
from batchgen.engines.paged.launched_step import LaunchedStep
from batchgen.engines.paged.runner import NOT_FINITE
from batchgen.engines.paged.scheduler import Scheduler
from batchgen.engines.paged.step import Sequence
from batchgen.generation import finite, refusals
from batchgen.generation.chosen import ChosenLogprob
from batchgen.generation.ends import LENGTH, STOP, EndFinder
from batchgen.generation.results import Ended, make_generation
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
        logprobs = None if self.logprobs is None else [ChosenLogprob(number, (), ()) for number in self.logprobs]
        finder, end = EndFinder(self.prompt, tokenizer), None
        for token in self.tokens:
            end = end or finder.append(token)
        end = end or (STOP if self.is_stopped else LENGTH)
        return make_generation(Ended(self.prompt, self.tokens, end, logprobs), tokenizer)


class StepReader:
    """Reads the tokens of steps, and finds the rows that they end.

    Args:
        scheduler: whose sequences get these tokens; it is told which of them end.
        tokenizer: of the model: it has the tokens that end a row, and makes texts, in which stop texts are looked for.
        signs: count the tokens.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: HfTokenizer, signs: SignsOfLife) -> None:
        self._scheduler, self._tokenizer, self._signs = scheduler, tokenizer, signs
        self._end_tokens = frozenset(tokenizer.end_tokens)
        self._stop_texts: dict[Sequence, EndFinder] = {}
        self.has_read = False  # the tokens of a step

    def read(self, launched: LaunchedStep) -> list[FinishedRow]:
        """Waits for the tokens of a step and gives them to their sequences; the rows that have ended."""
        tokens = launched.read_tokens()
        self.has_read = True
        for sequence, logprob in launched.read_logprobs():
            if sequence.slot >= 0 and sequence.logprobs is not None:
                sequence.logprobs.append(logprob)
        finished: list[FinishedRow] = []
        end_tokens, count = self._end_tokens, 0
        for sequence, token in zip(launched.step.sequences, tokens, strict=True):
            if sequence.slot < 0:
                continue  # it ended in the step before, when this one had been launched
            if token == NOT_FINITE:
                self._end(sequence)
                finished.append(FinishedRow(sequence.prompt, None, is_not_finite=True))
                continue
            sequence.tokens.append(token)
            count += 1
            is_stopped = token in end_tokens or (bool(sequence.prompt.params.stop) and self._stops(sequence, token))
            if is_stopped or len(sequence.tokens) == sequence.prompt_tokens + sequence.max_new_tokens:
                self._end(sequence)
                generated = sequence.tokens[sequence.prompt_tokens :]
                finished.append(FinishedRow(sequence.prompt, generated, is_stopped, sequence.logprobs))
        self._signs.generated_tokens += count
        return finished

    def _end(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        self._stop_texts.pop(sequence, None)

    def _stops(self, sequence: Sequence, token: int) -> bool:
        """Whether the token completes one of the row's stop texts."""
        texts = self._stop_texts.get(sequence)
        if texts is None:
            texts = self._stop_texts[sequence] = EndFinder(sequence.prompt, self._tokenizer)
        return texts.append(token) is not None
