"""What each forward computes: one token of every running sequence, and parts of new prompts. Pure.

All prompts are known and nobody waits for an answer, so the order is chosen for the whole: those with the most tokens
to generate first, that the end is short; among equals those that begin alike together, that the beginning is computed
once. A sequence is admitted if all that run are expected to fit into the cache until they end; where that was too
hopeful, the one admitted last is put back, and computed again later. Once all prompts are known, those that wait are
spread over the steps that the longest sequence needs anyhow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from batchgen.engines.paged import pages as paging
from batchgen.engines.paged.forecast import Forecast
from batchgen.engines.paged.pages import Pages
from batchgen.engines.paged.spread import Spread
from batchgen.engines.paged.step import Draft, Ints, Sequence, Step
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
        self._spread: Spread | None = None  # of those that wait; None: more may come
        self._again: deque[Sequence] = deque()  # put back, before all that wait
        self._free = list(range(slots - 1, -1, -1))
        self._prefilling: list[Sequence] = []
        self._decoding: list[Sequence] = []
        self._ending: set[Sequence] = set()  # nothing left to plan, the last token not read yet
        # Of each slot, so that a step of thousands of sequences is planned at once. Tokens that are or will be in the
        # cache without another one being generated; those that others had computed; the most to generate, and how many
        # of them are left.
        self._length = np.zeros(slots, np.int32)
        self._shared = np.zeros(slots, np.int32)
        self._most = np.zeros(slots, np.int32)
        self._left = np.zeros(slots, np.int32)
        self._runs = np.zeros(slots, np.bool_)
        self._rows: Ints | None = None  # slots of `_decoding`; None: they have changed
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
    def pages(self) -> int:
        """Of the cache."""
        return self._pages.count

    def holds(self, prompt: Prompt) -> bool:
        """Whether the cache has room for it and all that it may generate."""
        return len(prompt.tokens) + prompt.params.max_new_tokens <= self.capacity

    @property
    def waiting(self) -> int:
        """Sequences that have no place yet."""
        return len(self._waiting) + len(self._again)

    @property
    def running(self) -> int:
        """Sequences that have a place."""
        return self.slots - len(self._free)

    def add(self, prompts: Iterable[Prompt]) -> None:
        """These prompts wait. The cache `holds` each of them."""
        for prompt in prompts:
            sequence = Sequence(prompt)
            self._number += 1
            self._waiting.append(((sequence.most, sequence.tokens), self._number, sequence))
        self._waiting.sort(key=lambda entry: entry[:2])

    def complete(self) -> None:
        """No more prompts will be added."""
        sizes = [(len(entry[2].tokens), entry[2].most) for entry in self._waiting]
        lengths, most = np.array(sizes, np.int32).reshape(-1, 2).T
        self._spread = Spread(lengths, most, self._pages.count * paging.SIZE)

    def short_of_pages(self) -> bool:
        """Whether the next step has to put a sequence back. All steps must have been read then: its tokens are what
        is computed again."""
        return len(self._full()) > self._pages.available

    def plan(self) -> Step | None:
        """The next step; None: there is nothing to compute until a step in flight has been read, or at all."""
        while self.short_of_pages():
            self._put_back(max([*self._decoding, *self._prefilling], key=lambda sequence: sequence.admitted))
            self.preemptions += 1
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
            self._rows = None
        self._release(sequence)
        self._ended += 1
        self._ended_tokens += sequence.done
        self._ended_most += sequence.most
        if self._learn and self._ended >= _LEARNT_FROM:
            self._expected = max(_SMALLEST_SHARE, min(1.0, self._ended_tokens / self._ended_most))

    def restart(self, pages: int) -> list[Prompt]:
        """All that runs waits again, for a new cache of so many pages; no step is in flight.

        Returns:
            Prompts that do not fit into that cache even alone; they wait no more.
        """
        running = sorted([*self._decoding, *self._prefilling, *self._ending], key=lambda one: -one.admitted)
        for sequence in running:
            self._put_back(sequence)
            sequence.rewind()  # the tokens of steps that were lost are drawn again
        self._pages = Pages(pages)
        self._table_at, self._table_to = [], []
        all_waiting = [*self._again, *(entry[2] for entry in self._waiting)]
        self._again = deque(one for one in self._again if self.holds(one.prompt))
        self._waiting = [entry for entry in self._waiting if self.holds(entry[2].prompt)]
        if self._spread is not None:
            self.complete()
        return [one.prompt for one in all_waiting if not self.holds(one.prompt)]

    def _put_back(self, sequence: Sequence) -> None:
        """A sequence waits again, before all others, to be computed from its tokens so far."""
        for where in (self._decoding, self._prefilling):
            if sequence in where:
                where.remove(sequence)
        self._ending.discard(sequence)
        self._rows = None
        self._release(sequence)
        self._again.appendleft(sequence)
        self._blocked = _BLOCKED_STEPS

    def _release(self, sequence: Sequence) -> None:
        self._pages.give(sequence.pages)
        self._free.append(sequence.slot)
        self._runs[sequence.slot] = False
        sequence.pages, sequence.slot = [], -1

    def _slots(self) -> Ints:
        if self._rows is None:
            self._rows = np.fromiter((one.slot for one in self._decoding), np.int32, len(self._decoding))
        return self._rows

    def _full(self) -> NDArray[np.int64]:
        """Places in `_decoding` of the sequences whose next token begins a page."""
        return np.flatnonzero(self._length[self._slots()] % paging.SIZE == 0)

    def _plan_decoding(self, step: Draft) -> None:
        if not self._decoding:
            return
        full, slots = self._full().tolist(), self._slots()
        for place, page in zip(full, self._pages.take(len(full)), strict=True):
            self._append_page(self._decoding[place], page)
        step.decode(self._decoding, slots, self._length[slots])
        self._length[slots] += 1
        self._left[slots] -= 1
        last = np.flatnonzero(self._left[slots] == 0)
        if len(last):
            self._ending.update(self._decoding[place] for place in last.tolist())
            self._decoding = [self._decoding[place] for place in np.flatnonzero(self._left[slots]).tolist()]
            self._rows = None

    def _append_page(self, sequence: Sequence, page: int) -> None:
        self._table_at.append(sequence.slot * self.columns + len(sequence.pages))
        self._table_to.append(page)
        sequence.pages.append(page)

    def _plan_prompts(self, step: Draft) -> None:
        for begun in list(self._prefilling):
            if step.count >= self.budget or not self._plan_part(step, begun, self.budget):
                return
        if self._blocked and step.count:
            self._blocked -= 1
            return
        self._blocked = 0
        if not self.waiting or step.count >= (budget := self._most_tokens(step)):
            return
        forecast = self._forecast()
        while step.count < budget and (sequence := self._next()) is not None:
            pages, node = self._pages.find(sequence.tokens)
            own = len(sequence.tokens) - len(pages) * paging.SIZE
            first = min(own, budget - step.count)
            enough = self._free and -(-first // paging.SIZE) <= self._pages.available
            alone = self.running == 0
            rest = int(self._rest(np.array([sequence.most]), np.array([sequence.most - sequence.done]))[0])
            if not enough or not (alone or forecast.fits(own, rest)):
                self._pages.give(pages)
                self._blocked = _BLOCKED_STEPS
                return
            self._admit(sequence, pages, node)
            self._plan_part(step, sequence, budget)

    def _most_tokens(self, step: Draft) -> int:
        """Of a step that may admit sequences; they can wait, if they will end in time nevertheless."""
        if self._spread is None or self._again:
            return self.budget
        most = self._spread.most[: len(self._waiting)]
        slots, rests = self._running()
        tokens = self._spread.tokens(self._rest(most, most), self._length[slots], rests, step.count)
        return min(self.budget, tokens or self.budget)

    def _forecast(self) -> Forecast:
        slots, rests = self._running()
        # What another had computed already is counted there.
        return Forecast(self._pages.count, self._length[slots] - self._shared[slots], rests)

    def _running(self) -> tuple[NDArray[np.int64], Ints]:
        """Slots of the sequences that have a place, and the tokens that each is expected to generate yet."""
        slots = np.flatnonzero(self._runs)
        return slots, self._rest(self._most[slots], self._left[slots])

    def _rest(self, most: Ints, left: Ints) -> Ints:
        """Tokens that sequences are expected to generate from now on, of `most` in all, of which `left` are left."""
        expected = np.rint(most * self._expected).astype(np.int32) - (most - left)
        rest: Ints = np.clip(expected, np.minimum(left, paging.SIZE), left)
        return rest

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
        slot = sequence.slot = self._free.pop()
        sequence.admitted, sequence.node = self._number, node
        for page in pages:
            self._append_page(sequence, page)
        sequence.planned = len(pages) * paging.SIZE
        self._length[slot], self._shared[slot] = len(sequence.tokens), sequence.planned
        self._most[slot], self._left[slot] = sequence.most, sequence.most - sequence.done
        self._runs[slot] = True
        self._prefilling.append(sequence)

    def _plan_part(self, step: Draft, sequence: Sequence, budget: int) -> bool:
        """As much of the sequence's prompt as the step and the cache have room for; False: none."""
        begin = sequence.planned
        room = (self._pages.available + len(sequence.pages)) * paging.SIZE - begin
        count = min(len(sequence.tokens) - begin, budget - step.count, room)
        if count <= 0:
            return False
        end = begin + count
        for page in self._pages.take(-(-end // paging.SIZE) - len(sequence.pages)):
            self._append_page(sequence, page)
        step.prefill(sequence, begin, end)
        sequence.planned = end
        for page in range(begin // paging.SIZE, min(end, sequence.begin) // paging.SIZE):
            tokens = sequence.tokens[page * paging.SIZE : (page + 1) * paging.SIZE]
            sequence.node = self._pages.remember(sequence.node, tokens, sequence.pages[page])
        if end == len(sequence.tokens):
            self._prefilling.remove(sequence)
            self._left[sequence.slot] -= 1
            if self._left[sequence.slot]:
                self._decoding.append(sequence)
                self._rows = None
            else:
                self._ending.add(sequence)
        return True
