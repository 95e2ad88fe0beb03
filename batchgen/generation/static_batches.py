"""Tokenize → `model.generate` → decode, for engines that hold a Transformers model. Knows no engine."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from batchgen.device import can_reserve, free_bytes, is_out_of_memory, release, take_peak_bytes
from batchgen.engine import OutOfStep, Peers
from batchgen.generation import finite, refusals, selftest
from batchgen.generation.agreement import AgreedToken, check_equal_batches
from batchgen.generation.finite import NotFinite
from batchgen.generation.greedy import generate_greedily, pad
from batchgen.generation.limits import SizeLimits, rows_that_fit
from batchgen.generation.logprobs import Recorder
from batchgen.generation.sampling import Sampler
from batchgen.generation.selftest import SelfTest
from batchgen.generation.stopping import Stopper, StopTexts, generation
from batchgen.models import architectures, footprint, loading
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Batch, Prompt


class _Abandoned(Exception):
    """`stop()` became true in the middle of a batch."""


class StaticBatches:
    """Batches of prompts through `model.generate`: one in, one out.

    Args:
        model: a causal language model of Transformers, in eval mode. Its generation config is replaced by an empty one,
            so that a temperature or a penalty which came with the weights has no effect.
        tokenizer: the same model's.
        device: where token ids go. Not read off the model: that may have its first layers on a disk.
        devices: all devices the model is on; what a batch may take is measured there.
        batch_size: most rows of a batch; None: as many as an estimate says will fit.
        local_size: ranks that share this host's memory.
        count: is told how many tokens each decode step has generated.
        generate_kwargs: passed on to `model.generate`, `synced_gpus` for one.
        limits: most rows by length, as `SizeLimits.remember` takes them, learnt by earlier attempts.
        kept_free: bytes of each device that a forward needs besides.
        most_rows: of a batch whose size is estimated; None: as `memory.rows_that_fit` has it.
        reserve: take the memory that a batch is estimated to need, and give it back, before the model sees it: for
            models whose forward may not fail.
        check: compare rows of the first batch with themselves alone (`selftest`).
        peers: the ranks that generate these batches together with this one; None: it is alone. `stop` must be theirs.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: HfTokenizer,
        *,
        device: torch.device,
        devices: Sequence[torch.device] = (),
        batch_size: int | None,
        local_size: int = 1,
        count: Callable[[int], None],
        generate_kwargs: Mapping[str, Any] | None = None,
        limits: Mapping[int, int] | None = None,
        kept_free: int = 0,
        most_rows: int | None = None,
        reserve: bool = False,
        check: bool = False,
        peers: Peers | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._device = device
        self._devices = devices or [device]
        self._batch_size = batch_size
        self._local_size = local_size
        self._count = count
        self._generate_kwargs = dict(generate_kwargs or {})
        self._kept_free = kept_free
        self._most_rows_of_any = most_rows
        self._reserve = reserve
        self._unchecked = check
        self._peers = peers
        self._takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
        self._most_padded = architectures.most_padded_tokens(tokenizer.config)
        self._limits = SizeLimits()
        for length, rows in (limits or {}).items():
            self._limits.remember(length, rows)
        self._held: Prompt | None = None
        self._has_generated = False
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        loading.read_head_once(model)

    def run(self, prompts: Iterator[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        """Every prompt of `prompts`, in finished batches; ends early, without what is in flight, once `stop()` is true.

        `prompts` come longest first, so that the rows of a batch end at about the same time.
        """
        while not stop() and (batch := self.pull(prompts)):
            try:
                yield from self.finish(batch, stop)
            except _Abandoned:
                return

    def pull(self, prompts: Iterator[Prompt]) -> list[Prompt]:
        """The next batch; empty when there is nothing left."""
        free = 0
        if self._batch_size is None:
            free = free_bytes(self._devices, self._local_size) - len(self._devices) * self._kept_free
            free = free if self._peers is None else self._peers.least(free)
        batch: list[Prompt] = []
        prompt_tokens = new_tokens = most = 0
        while not batch or len(batch) < most:
            prompt, self._held = self._held or next(prompts, None), None
            if prompt is None:
                break
            prompt_tokens = max(prompt_tokens, len(prompt.tokens))
            new_tokens = max(new_tokens, prompt.params.max_new_tokens)
            most = self._most_rows(prompt_tokens, new_tokens, free)
            if batch and (len(batch) >= most or not self._can_join(batch, prompt)):
                self._held = prompt
                break
            batch.append(prompt)
        if self._peers is not None:
            check_equal_batches(self._peers, batch)
        return batch

    def _can_join(self, batch: Sequence[Prompt], prompt: Prompt) -> bool:
        """Whether `prompt` can be in a batch with these."""
        if self._most_padded is None:
            return True
        together = [*batch, prompt]
        return len({len(one.tokens) for one in together}) == 1 or sum(_lengths(together)) <= self._most_padded

    def _most_rows(self, prompt_tokens: int, new_tokens: int, free: int) -> int:
        learnt = self._limits.most(prompt_tokens + new_tokens)
        ceiling = self._batch_size
        if ceiling is None:
            row = self._row_bytes(prompt_tokens, new_tokens)
            ceiling = rows_that_fit(free, row, self._device, self._most_rows_of_any)
        return ceiling if learnt is None else min(ceiling, learnt)

    def _row_bytes(self, prompt_tokens: int, new_tokens: int) -> int:
        return footprint.bytes_per_row(
            self._tokenizer.config,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            item_bytes=self._model.dtype.itemsize,
            eager=not getattr(self._model, "_supports_sdpa", False),
            ranks=1 if self._peers is None else self._peers.count,
        )

    def finish(self, batch: Sequence[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        """`batch`, in as many pieces as memory asks for; a prompt that does not fit alone is a failed generation."""
        parts = deque([list(batch)])
        while parts:
            part = parts.popleft()
            length = sum(_lengths(part))
            most = self._limits.most(length)
            if most == 0:
                yield Batch([refusals.refuse(prompt) for prompt in part], 0, take_peak_bytes(self._devices))
                continue
            if most is not None and len(part) > most:
                parts.extendleft(reversed([part[i : i + most] for i in range(0, len(part), most)]))
                continue
            finished = self._attempt(part, stop)
            if finished is not None:
                yield finished
                done = {generation.index for generation in finished.generations}
                parts.extendleft(_by_length([prompt for prompt in part if prompt.index not in done]))
            elif len(part) == 1:
                yield Batch([refusals.refuse(part[0])], 0, take_peak_bytes(self._devices))
            else:
                self._limits.remember(length, (len(part) + 1) // 2)
                parts.appendleft(part)

    def _attempt(self, batch: Sequence[Prompt], stop: Callable[[], bool]) -> Batch | None:
        """The finished batch, or None: out of memory."""
        size = len(batch) * self._row_bytes(*_lengths(batch)) + self._kept_free
        fits = not self._reserve or can_reserve(size, self._device)
        if self._peers is not None:
            fits = not self._peers.any_rank(not fits)
        try:
            if fits:
                with nullcontext() if self._has_generated else loading.refuse_model(self._tokenizer.config):
                    finished = self.generate(batch, stop)
                self._has_generated = True
                return finished
        except OutOfStep as error:
            error.length, error.rows = sum(_lengths(batch)), len(batch)
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self._peers is not None:
                alone = OutOfStep("out of memory in a batch that several ranks generate together")
                alone.length, alone.rows = sum(_lengths(batch)), len(batch)
                raise alone from error
        # Only here: while the exception is handled, its traceback holds every tensor of the failed call.
        release()
        return None

    def generate(self, batch: Sequence[Prompt], stop: Callable[[], bool]) -> Batch:
        """`batch` in one call of `model.generate`; out of memory is the caller's business."""
        inputs = self._pad(batch)
        width = inputs["input_ids"].shape[1]
        texts = StopTexts.of(batch, self._tokenizer)
        not_finite = NotFinite(None if self._peers is None else self._peers.tokens)
        stopper = Stopper(
            batch, self._tokenizer.end_tokens, texts, not_finite, device=self._device, stop=stop, count=self._count
        )
        sampler = Sampler(batch, self._device)
        choosers: list[Any] = [sampler] if sampler.needed else []
        if self._peers is not None:
            choosers.append(AgreedToken(self._peers.tokens))
        recorder = Recorder(batch, choosers, self._device)
        output = generate_greedily(
            self._model,
            self._tokenizer,
            inputs,
            max(prompt.params.max_new_tokens for prompt in batch),
            logits_processor=LogitsProcessorList([not_finite, *([recorder] if recorder.needed else choosers)]),
            stopping_criteria=StoppingCriteriaList([stopper]),
            **self._generate_kwargs,
        )
        if stopper.abandoned:
            raise _Abandoned
        rows = output[:, width:].tolist()
        if self._unchecked:
            self._check(batch, rows, stopper)
        return self._collect(batch, rows, stopper, width, recorder.read())

    def _check(self, batch: Sequence[Prompt], rows: list[list[int]], stopper: Stopper) -> None:
        lengths, failed = stopper.lengths.tolist(), stopper.failed.tolist()
        good = [row for row in range(len(batch)) if not failed[row]]
        test = SelfTest(self._model, self._device, self._tokenizer.decode, len(batch), measures=self._peers is None)
        for row in (good[place] for place in selftest.choose([batch[row] for row in good])):
            tokens = rows[row][: min(lengths[row], selftest.TOKENS)]
            try:
                test.check(batch[row], tokens)
            except selftest.TextChanged:
                # Of some models one forward over the whole row is not what its steps are, whatever the batch.
                if self._peers is not None or self._generate_alone(batch[row], len(tokens)) != tokens:
                    raise
            self._unchecked = False

    def _generate_alone(self, prompt: Prompt, count: int) -> list[int]:
        """`count` tokens behind `prompt`, chosen greedily, with nothing beside it."""
        inputs = self._pad([prompt])
        output = generate_greedily(self._model, self._tokenizer, inputs, count, end=False, **self._generate_kwargs)
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
        logprobs: Mapping[int, Sequence[float]],
    ) -> Batch:
        """The rows that have ended. One that is padded and not finite is left out: what fills it may be the reason, so
        it is generated again without."""
        generations = []
        padded = 0
        lengths, stopped, failed = (tensor.tolist() for tensor in (stopper.lengths, stopper.stopped, stopper.failed))
        for number, (prompt, row, length) in enumerate(zip(batch, rows, lengths, strict=True)):
            padding = width - len(prompt.tokens)
            padded += padding + stopper.steps - length
            if not failed[number]:
                asked = logprobs[number][:length] if number in logprobs else None
                generations.append(generation(prompt, row[:length], stopped[number], self._tokenizer, asked))
            elif not padding:
                generations.append(finite.fail(prompt, finite.dtype_of(self._model)))
        if any(failed):
            self._count(-sum(failed))  # counted with the step in which they failed
        return Batch(generations, padded, take_peak_bytes(self._devices))


def _by_length(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Batches without padding."""
    batches: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        batches.setdefault(len(prompt.tokens), []).append(prompt)
    return list(batches.values())


def _lengths(batch: Sequence[Prompt]) -> tuple[int, int]:
    """Tokens of the longest prompt, and the most new ones: what every row of `batch` can come to."""
    return max(len(p.tokens) for p in batch), max(p.params.max_new_tokens for p in batch)
