"""When a row ends inside one `model.generate` call, which has one length for the whole batch.

`Stopper` ends each row on its own. Rows whose end depends on more than their length and the model's ends of sequence,
and rows whose next token depends on their last one, are followed on the host (`ends.EndFinder`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from batchgen.generation import ends
from batchgen.generation.ends import LENGTH, STOP, End, EndFinder
from batchgen.generation.finite import NotFinite
from batchgen.generation.processor import ChosenToken
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Prompt

_NO_TOKEN = -1  # in the place of one: the row has failed


class Stopper(StoppingCriteria):
    """Ends each row at its own end (`generation.ends`); the batch when `stop()` is true.

    What a row is worth is read off here after `generate`, never off the padded output: `lengths` counts tokens up to
    and including the last one, `failed` says which rows have ended because their logits were not finite.

    The device is not waited for, except by rows that are followed on the host: `generate` itself waits once a step,
    and the number of live rows is copied before that and read after it.

    Args:
        prompts: the rows of the batch, in order.
        tokenizer: the model's.
        not_finite: has marked the rows of the current step whose logits are not finite.
        processor: has chosen the tokens of the current step, and is given those that it awaits.
        stop: whether to end the whole batch now; asked at each step.
        count: is called at each step with the number of tokens that the batch has generated in it.

    Attributes:
        lengths: generated tokens of each row, int64 [rows].
        failed, impossible: rows whose logits were not finite, and those that had no token left, bool [rows].
        errors: what went wrong with the constraints of rows.
        steps: made so far.
        abandoned: `stop()` has ended the batch.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: HfTokenizer,
        not_finite: NotFinite,
        processor: ChosenToken,
        *,
        stop: Callable[[], bool],
        count: Callable[[int], None],
    ) -> None:
        device, rows = processor.device, len(prompts)
        limits = [prompt.params.max_new_tokens for prompt in prompts]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.failed = torch.zeros(rows, dtype=torch.bool, device=device)
        self.impossible = torch.zeros(rows, dtype=torch.bool, device=device)
        self.errors: dict[int, str] = {}
        self.steps = 0
        self.abandoned = False
        self.ends_by_token = not any(prompt.params.ignore_eos for prompt in prompts)
        """`generate` may end rows at ends of sequence by itself."""
        self._stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self._alive = torch.ones(rows, dtype=torch.bool, device=device)
        self._limits = torch.tensor(limits, dtype=torch.long, device=device)
        self._longest = max(limits)
        self._end = torch.tensor(sorted(tokenizer.end_tokens), dtype=torch.long, device=device)
        awaiting = [row for row, prompt in enumerate(prompts) if ends.needs_tokens(prompt) or processor.may_await(row)]
        self._finders = {row: EndFinder(prompts[row], tokenizer) for row in awaiting}
        self._is_followed = torch.zeros(rows, dtype=torch.bool, device=device)
        self._is_followed[awaiting] = True
        self._ends: dict[int, End] = {}  # of rows that are followed
        self._not_finite, self._processor = not_finite, processor
        self._stop = stop
        self._count = count
        self._live = torch.tensor(rows, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.steps += 1
        if self._copied is not None:
            self._copied.synchronize()
        self._count(int(self._live))
        failed = self._alive & self._not_finite.rows
        self.failed |= failed
        self._alive &= ~failed
        if self._processor.impossible is not None:
            impossible = self._alive & self._processor.impossible
            self.impossible |= impossible
            self._alive &= ~impossible
        self.lengths += self._alive
        ended = torch.isin(input_ids[:, -1], self._end) & ~self._is_followed
        if self._finders:
            followed = self._follow(input_ids)
            if followed:
                ended[followed] = True
        self._stopped |= self._alive & ended
        self._alive &= ~ended & (self._limits > self.steps)
        self._live.copy_(self._alive.sum(), non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if self.steps < self._longest and self._stop():
            self.abandoned = True
            return torch.ones_like(self._alive)
        return ~self._alive

    def read_ends(self) -> list[End]:
        """Returns why each row has ended; of a row that has failed it means nothing."""
        stopped = self._stopped.tolist()
        return [self._ends.get(row, STOP if stopped[row] else LENGTH) for row in range(len(stopped))]

    def _follow(self, input_ids: torch.Tensor) -> list[int]:
        """Takes the tokens of rows that are followed; returns those that have ended, which are followed no more."""
        rows = list(self._finders)
        last = torch.where(self._not_finite.rows[rows], _NO_TOKEN, input_ids[rows, -1])
        if self._processor.impossible is not None:
            last = torch.where(self._processor.impossible[rows], _NO_TOKEN, last)
        tokens = dict(zip(rows, last.tolist(), strict=True))
        found: dict[int, End | None] = {
            row: STOP if token < 0 else self._finders[row].append(token) for row, token in tokens.items()
        }
        # Whether a constraint is met also matters to a row that is as long as it may be, or that has ended by itself.
        going_on = [row for row, end in found.items() if tokens[row] >= 0 and end in (None, LENGTH, STOP)]
        self._processor.advance({row: tokens[row] for row in going_on})
        for row in found:
            if (error := self._processor.find_error(row)) is not None:
                self.errors[row] = error
                found[row] = STOP
            elif row in going_on and self._processor.is_complete(row):
                found[row] = STOP
        ended = {row: end for row, end in found.items() if end is not None}
        self._ends |= ended
        for row in ended:
            del self._finders[row]
        return list(ended)
