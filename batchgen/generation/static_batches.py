"""Tokenize → `model.generate` → decode, for engines that hold a Transformers model. Knows no engine."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from batchgen.device import is_out_of_memory, release, take_peak_bytes
from batchgen.engine import OutOfStep, Peers, SignsOfLife
from batchgen.generation import finite, refusals, results, selftest
from batchgen.generation.agreement import check_equal_batches
from batchgen.generation.choice import ChosenLogprob
from batchgen.generation.finite import NotFinite
from batchgen.generation.greedy import LoadedModel, generate_greedily, pad
from batchgen.generation.processor import ChosenToken
from batchgen.generation.prompt_logprobs import PromptLogprobs, find_prompt_logprobs
from batchgen.generation.results import Ended
from batchgen.generation.selftest import SelfTest
from batchgen.generation.shared_prefill import SharedPrefill
from batchgen.generation.sizing import BatchSizer, BatchSizing, find_longest, group_by_length
from batchgen.generation.stopping import Stopper
from batchgen.models import loading
from batchgen.types import Batch, Prompt


class _Abandoned(Exception):
    """`stop()` became true in the middle of a batch."""


class StaticBatches:
    """Batches of prompts through `model.generate`: one in, one out.

    Args:
        loaded: the model. Its generation config is replaced by an empty one, so that a temperature or a penalty which
            came with the weights has no effect.
        sizing: how many rows a batch may have.
        signs: the engine's signs of life; each decode step adds the tokens that it has generated.
        counts_steps: each decode step is counted in `signs`, too; False: the engine counts its steps itself.
        check: compare rows of the first batch with themselves alone (`selftest`).
        peers: the ranks that generate these batches together with this one, and whose answer `stop` then has to be;
            None: this rank is alone.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sizing: BatchSizing,
        signs: SignsOfLife,
        *,
        counts_steps: bool = True,
        check: bool = False,
        peers: Peers | None = None,
    ) -> None:
        self.loaded = loaded
        self._model, self._tokenizer, self._device = loaded.model, loaded.tokenizer, loaded.device
        self._signs, self._counts_steps = signs, counts_steps
        self._must_check = check
        self._peers = peers
        self._sizer = BatchSizer(loaded, sizing, peers)
        self._takes_positions = "position_ids" in inspect.signature(type(self._model).forward).parameters
        self._next: Prompt | None = None  # pulled already, for the next batch
        self._has_generated = False
        self._model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        loading.read_head_once(self._model)

    def run(self, prompts: Iterator[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        """Generates every prompt of `prompts`, and yields finished batches.

        It ends early, without what is in flight, once `stop()` is true. `prompts` come longest first, so that the rows
        of a batch end at about the same time.
        """
        while not stop() and (batch := self.pull(prompts)):
            try:
                yield from self.finish(batch, stop)
            except _Abandoned:
                return

    def pull(self, prompts: Iterator[Prompt]) -> list[Prompt]:
        """Takes the next batch from `prompts`; an empty one when there is nothing left."""
        free = self._sizer.measure_free()
        batch: list[Prompt] = []
        prompt_tokens = new_tokens = max_rows = 0
        while not batch or len(batch) < max_rows:
            prompt, self._next = self._next or next(prompts, None), None
            if prompt is None:
                break
            prompt_tokens = max(prompt_tokens, len(prompt.tokens))
            new_tokens = max(new_tokens, prompt.params.max_new_tokens)
            max_rows = self._sizer.max_rows(prompt_tokens, new_tokens, free)
            if batch and (len(batch) >= max_rows or not self._sizer.can_join(batch, prompt)):
                self._next = prompt
                break
            batch.append(prompt)
        if self._peers is not None:
            check_equal_batches(self._peers, batch)
        return batch

    def finish(self, batch: Sequence[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        """Generates `batch` in as many parts as memory asks for; a prompt that does not fit alone is a failed one."""
        parts = deque([list(batch)])
        while parts:
            part = parts.popleft()
            length = sum(find_longest(part))
            max_rows = self._sizer.limits.max_rows(length)
            if max_rows == 0:
                yield self._refuse(part)
                continue
            if max_rows is not None and len(part) > max_rows:
                parts.extendleft(reversed([part[i : i + max_rows] for i in range(0, len(part), max_rows)]))
                continue
            finished = self._attempt(part, stop)
            if finished is not None:
                yield finished
                done = {(generation.index, generation.sample) for generation in finished.generations}
                open_prompts = [prompt for prompt in part if (prompt.index, prompt.sample) not in done]
                parts.extendleft(group_by_length(open_prompts))
            elif len(part) == 1:
                yield self._refuse(part)
            else:
                self._sizer.limits.remember(length, (len(part) + 1) // 2)
                parts.appendleft(part)

    def _refuse(self, prompts: Sequence[Prompt]) -> Batch:
        return Batch([refusals.refuse(prompt) for prompt in prompts], 0, take_peak_bytes(self._sizer.devices))

    def _attempt(self, batch: Sequence[Prompt], stop: Callable[[], bool]) -> Batch | None:
        """Returns the finished batch; None: out of memory."""
        fits = self._sizer.fits(batch)
        try:
            if fits:
                with nullcontext() if self._has_generated else loading.refuse_model(self._tokenizer.config):
                    finished = self.generate(batch, stop)
                self._has_generated = True
                return finished
        except OutOfStep as error:
            error.length, error.rows = sum(find_longest(batch)), len(batch)
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self._peers is not None:
                out_of_step = OutOfStep("out of memory in a batch that several ranks generate together")
                out_of_step.length, out_of_step.rows = sum(find_longest(batch)), len(batch)
                raise out_of_step from error
        # Only here: while the exception is handled, its traceback holds every tensor of the failed call.
        release()
        return None

    def generate(self, batch: Sequence[Prompt], stop: Callable[[], bool]) -> Batch:
        """Generates `batch` in one call of `model.generate`; out of memory is the caller's business."""
        inputs = self._pad(batch)
        width = inputs["input_ids"].shape[1]
        agree = None if self._peers is None else self._peers.tokens
        not_finite = NotFinite(agree)
        chosen = ChosenToken(batch, self._tokenizer, self._device, not_finite, agree)
        stopper = Stopper(batch, self._tokenizer, not_finite, chosen, stop=stop, count=self._count_step)
        with SharedPrefill([(prompt.index, prompt.tokens) for prompt in batch]).of(self._model) as prefill:
            output = generate_greedily(
                self.loaded,
                inputs,
                max(prompt.params.max_new_tokens for prompt in batch),
                end=stopper.ends_by_token,
                logits_processor=LogitsProcessorList([not_finite, *([chosen] if chosen.is_needed else [])]),
                stopping_criteria=StoppingCriteriaList([stopper]),
            )
        if stopper.abandoned:
            raise _Abandoned
        rows = output[:, width:].tolist()
        if self._must_check:
            self._check(batch, rows, stopper)
        finished = self._collect(batch, rows, stopper, width, chosen.read_logprobs())
        not_padded = sum(width - len(batch[row].tokens) for row in prefill.spared_rows)
        return replace(finished, padded_tokens=finished.padded_tokens - not_padded)

    def _check(self, batch: Sequence[Prompt], rows: list[list[int]], stopper: Stopper) -> None:
        lengths, failed = stopper.lengths.tolist(), stopper.failed.tolist()
        finite_rows = [row for row in range(len(batch)) if not failed[row]]
        test = SelfTest(self._model, self._device, self._tokenizer.decode, len(batch), measures=self._peers is None)
        for row in (finite_rows[place] for place in selftest.choose([batch[row] for row in finite_rows])):
            tokens = rows[row][: min(lengths[row], selftest.TOKENS)]
            try:
                test.check(batch[row], tokens)
            except selftest.TextChanged:
                # Of some models one forward over the whole row is not what its steps are, whatever the batch.
                if self._peers is not None or self._generate_alone(batch[row], len(tokens)) != tokens:
                    raise
            self._must_check = False

    def _generate_alone(self, prompt: Prompt, count: int) -> list[int]:
        """Returns `count` tokens behind `prompt`, chosen greedily, with nothing beside it."""
        inputs = self._pad([prompt])
        output = generate_greedily(self.loaded, inputs, count, end=False)
        tokens: list[int] = output[0, len(prompt.tokens) :].tolist()
        return tokens

    def _pad(self, batch: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        rows = [prompt.tokens for prompt in batch]
        return pad(rows, self._tokenizer.pad_token, self._device, positions=self._takes_positions)

    def _collect(
        self,
        batch: Sequence[Prompt],
        rows: list[list[int]],
        stopper: Stopper,
        width: int,
        logprobs: Mapping[int, Sequence[ChosenLogprob]],
    ) -> Batch:
        """Returns the rows that have ended.

        A row that is padded and not finite is left out: what fills it may be the reason, so that it is generated once
        more without padding.
        """
        generations = []
        padded = 0
        lengths, failed, impossible = (
            tensor.tolist() for tensor in (stopper.lengths, stopper.failed, stopper.impossible)
        )
        ends = stopper.read_ends()
        for number, (prompt, row, length) in enumerate(zip(batch, rows, lengths, strict=True)):
            padding = width - len(prompt.tokens)
            padded += padding + stopper.steps - length
            if failed[number]:
                if not padding:
                    generations.append(finite.fail(prompt, finite.dtype_of(self._model)))
            elif number in stopper.errors:
                generations.append(results.fail_constraint(prompt, stopper.errors[number]))
            elif impossible[number]:
                generations.append(results.fail_impossible(prompt))
            else:
                own = logprobs[number][:length] if number in logprobs else None
                ended = Ended(prompt, row[:length], ends[number], own, self._find_prompt_logprobs(prompt))
                generations.append(results.make_generation(ended, self._tokenizer))
        self._signs.generated_tokens -= sum(failed) + sum(
            impossible
        )  # they were counted with the step in which they failed
        return Batch(generations, padded, take_peak_bytes(self._sizer.devices))

    def _find_prompt_logprobs(self, prompt: Prompt) -> PromptLogprobs | None:
        count = prompt.params.prompt_logprobs
        return None if count is None else find_prompt_logprobs(self._model, prompt.tokens, count, self._device)

    def _count_step(self, tokens: int) -> None:
        self._signs.generated_tokens += tokens
        if self._counts_steps:
            self._signs.steps += 1
