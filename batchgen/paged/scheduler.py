"""What each forward computes: one token of every running sequence, and parts of new prompts. Pure.

All prompts are known and nobody waits for an answer, so the order is chosen for the whole: those with the most tokens
to generate first, that the end is short; among equals those that begin alike together, that the beginning is computed
once. A sequence is admitted if all that run are expected to fit into the cache until they end; where that was too
hopeful, the one admitted last is put back, and computed again later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from batchgen.paged import pages as paging
from batchgen.paged.forecast import Forecast
from batchgen.paged.pages import Pages
from batchgen.paged.step import Draft, Ints, Sequence, Step
from batchgen.types import Prompt

_LEARNT_FROM = 64  # rows that have ended before their lengths are believed
_SMALLEST_SHARE = 0.05
_BLOCKED_STEPS = 8  # between two tries to admit into a full cache: prompts that come in bulk share a forward


class Scheduler:
    """Plans steps over `pages` pages.

    Args:
        slots: most sequences at once.
        pages: of the cache.
        width: most tokens of a sequence.
        budget: most tokens of a step.
        expected: the share of its most new tokens that a row is expected to generate; None: learnt from the rows.
    """

    def __init__(self, *, slots: int, pages: int, width: int, budget: int, expected: float | None = None) -> None:
        self.slots, self.budget = slots, budget
        self.columns = -(-width // paging.SIZE)
        self.preemptions = 0
        self._pages = Pages(pages)
        self._waiting: list[tuple[tuple[int, list[int]], int, Sequence]] = []  # sorted, the next one last
        self._again: deque[Sequence] = deque()  # put back, before all that wait
        self._free = list(range(slots - 1, -1, -1))
        self._prefilling: list[Sequence] = []
        self._decoding: list[Sequence] = []
        self._length = np.zeros(slots, np.int32)  # `planned` of the sequences that decode
        self._left = np.zeros(slots, np.int32)
        self._ending: set[Sequence] = set()  # nothing left to plan, the last token not read yet
        self._number = 0
        self._blocked = 0
        self._expected, self._learn = expected if expected is not None else 1.0, expected is None
        self._ended = self._ended_tokens = self._ended_most = 0
        self._table_at: list[int] = []
        self._table_to: list[int] = []

    @property
    def capacity(self) -> int:
        """Most tokens of a sequence that has the cache for itself."""
        return min(self._pages.count, self.columns) * paging.SIZE

    @property
    def waiting(self) -> int:
        """Sequences that have no place yet."""
        return len(self._waiting) + len(self._again)

    @property
    def running(self) -> int:
        """Sequences that have a place."""
        return self.slots - len(self._free)

    def add(self, prompts: Iterable[Prompt]) -> None:
        """These prompts wait. None of them may be longer than `capacity`, with all it may generate."""
        for prompt in prompts:
            tokens = list(prompt.tokens)
            self._number += 1
            sequence = Sequence(prompt, tokens, left=prompt.params.max_new_tokens)
            self._waiting.append(((sequence.left, tokens), self._number, sequence))
        self._waiting.sort(key=lambda entry: entry[:2])

    def short_of_pages(self) -> bool:
        """Whether the next step has to put a sequence back. All steps must have been read then: its tokens are what
        is computed again."""
        return bool(self._decoding) and int(self._needing().size) > self._pages.available

    def plan(self) -> Step | None:
        """The next step; None: there is nothing to compute until a step in flight has been read, or at all."""
        while self._decoding and self._needing().size > self._pages.available:
            self._put_back()
        step = Draft()
        self._plan_decoding(step)
        self._plan_prompts(step)
        if not step.count:
            return None
        made = step.made(self._table_at, self._table_to)
        self._table_at, self._table_to = [], []
        return made

    def ended(self, sequence: Sequence) -> None:
        """The sequence needs its place no longer. What a step in flight still writes there comes before whatever a
        later step does with it."""
        if sequence in self._ending:
            self._ending.discard(sequence)
        else:
            self._decoding.remove(sequence)
        self._release(sequence)
        self._ended += 1
        self._ended_tokens += len(sequence.tokens) - len(sequence.prompt.tokens)
        self._ended_most += sequence.prompt.params.max_new_tokens
        if self._learn and self._ended >= _LEARNT_FROM:
            self._expected = max(_SMALLEST_SHARE, min(1.0, self._ended_tokens / self._ended_most))

    def _release(self, sequence: Sequence) -> None:
        self._pages.give(sequence.pages)
        self._free.append(sequence.slot)
        sequence.pages, sequence.slot = [], -1

    def _put_back(self) -> None:
        """The sequence that was admitted last waits again, to be computed from its tokens so far."""
        last = max([*self._decoding, *self._prefilling], key=lambda sequence: sequence.admitted)
        (self._prefilling if last in self._prefilling else self._decoding).remove(last)
        done = len(last.tokens) - len(last.prompt.tokens)
        last.left = last.prompt.params.max_new_tokens - done
        self._release(last)
        self._again.appendleft(last)
        self._blocked = _BLOCKED_STEPS
        self.preemptions += 1

    def _needing(self) -> Ints:
        """Slots of the decoding sequences whose next token begins a page."""
        slots = np.fromiter((sequence.slot for sequence in self._decoding), np.int32, len(self._decoding))
        return slots[self._length[slots] % paging.SIZE == 0]

    def _plan_decoding(self, step: Draft) -> None:
        if not self._decoding:
            return
        slots = np.fromiter((sequence.slot for sequence in self._decoding), np.int32, len(self._decoding))
        positions = self._length[slots]
        full = np.flatnonzero(positions % paging.SIZE == 0)
        for place, page in zip(full.tolist(), self._pages.take(len(full)), strict=True):
            self._append_page(self._decoding[place], page)
        step.decode(self._decoding, slots, positions)
        self._length[slots] += 1
        self._left[slots] -= 1
        if (self._left[slots] == 0).any():
            last = [sequence for sequence in self._decoding if self._left[sequence.slot] == 0]
            self._ending.update(last)
            self._decoding = [sequence for sequence in self._decoding if self._left[sequence.slot] > 0]

    def _append_page(self, sequence: Sequence, page: int) -> None:
        self._table_at.append(sequence.slot * self.columns + len(sequence.pages))
        self._table_to.append(page)
        sequence.pages.append(page)

    def _plan_prompts(self, step: Draft) -> None:
        for sequence in list(self._prefilling):
            if step.count >= self.budget or not self._plan_part(step, sequence):
                return
        if self._blocked and step.count:
            self._blocked -= 1
            return
        self._blocked = 0
        forecast = self._forecast()
        while step.count < self.budget and (sequence := self._next()) is not None:
            pages, node = self._pages.find(sequence.tokens)
            own = len(sequence.tokens) - len(pages) * paging.SIZE
            first = min(own, self.budget - step.count)
            enough = self._free and -(-first // paging.SIZE) <= self._pages.available
            alone = not (self._decoding or self._prefilling or self._ending)
            if not enough or not (alone or forecast.fits(own, self._rest(sequence))):
                self._pages.give(pages)
                self._blocked = _BLOCKED_STEPS
                return
            self._admit(sequence, pages, node)
            self._plan_part(step, sequence)

    def _forecast(self) -> Forecast:
        running = [*self._decoding, *self._prefilling]
        # What another had computed already is counted there.
        lengths = [len(sequence.tokens) - sequence.shared for sequence in running]
        ending = [len(sequence.tokens) - sequence.shared for sequence in self._ending]
        rests = [self._rest(sequence) for sequence in running]
        return Forecast(self._pages.count, lengths + ending, rests + [0] * len(ending))

    def _rest(self, sequence: Sequence) -> int:
        """Tokens that the sequence is expected to generate from now on."""
        most = sequence.prompt.params.max_new_tokens
        done = len(sequence.tokens) - len(sequence.prompt.tokens)
        return max(min(paging.SIZE, most - done), round(most * self._expected) - done)

    def _next(self) -> Sequence | None:
        if self._again:
            return self._again[0]
        return self._waiting[-1][2] if self._waiting else None

    def _admit(self, sequence: Sequence, pages: list[int], node: int) -> None:
        if self._again:
            self._again.popleft()
        else:
            self._waiting.pop()
        self._number += 1
        sequence.slot, sequence.admitted, sequence.node = self._free.pop(), self._number, node
        for page in pages:
            self._append_page(sequence, page)
        sequence.planned = sequence.shared = len(pages) * paging.SIZE
        self._prefilling.append(sequence)

    def _plan_part(self, step: Draft, sequence: Sequence) -> bool:
        """As much of the sequence's prompt as the step and the cache have room for; False: none."""
        begin = sequence.planned
        room = (self._pages.available + len(sequence.pages)) * paging.SIZE - begin
        count = min(len(sequence.tokens) - begin, self.budget - step.count, room)
        if count <= 0:
            return False
        end = begin + count
        for page in self._pages.take(-(-end // paging.SIZE) - len(sequence.pages)):
            self._append_page(sequence, page)
        step.prefill(sequence, begin, end)
        sequence.planned = end
        prompt = len(sequence.prompt.tokens)
        for page in range(begin // paging.SIZE, min(end, prompt) // paging.SIZE):
            tokens = sequence.tokens[page * paging.SIZE : (page + 1) * paging.SIZE]
            sequence.node = self._pages.remember(sequence.node, tokens, sequence.pages[page])
        if end == len(sequence.tokens):
            self._prefilling.remove(sequence)
            sequence.left -= 1
            (self._decoding.append if sequence.left else self._ending.add)(sequence)
            self._length[sequence.slot], self._left[sequence.slot] = end, sequence.left
        return True
