"""What each step computes: one token of every sequence that decodes, and prefill chunks of new ones. Pure.

All prompts are there from the start and nobody waits for an answer, so the order is chosen for the whole: those with
the most tokens to generate first, so that the end is short; among equals those that begin alike together, so that
their common prefix is computed once. A sequence is admitted if all that run are expected to fit into the cache until
they end; where that was too hopeful, the one that was admitted last is preempted, and computed again later. Once all
prompts have come in, the prefill of those that wait is spread over the steps that the longest sequence needs anyhow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from batchgen.engines.paged.admission import CacheForecast, ExpectedLengths
from batchgen.engines.paged.layer_groups import ONE_GROUP, LayerGroups
from batchgen.engines.paged.page_tables import PageTables, SharedPrefix
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.prefill_budget import PrefillBudget
from batchgen.engines.paged.step import Ints, Sequence, Step, StepDraft, StepLimits
from batchgen.types import Prompt

_STEPS_BETWEEN_TRIES = 8  # to admit into a full cache: prompts that come in bulk share a forward


class Scheduler:
    """Plans steps over the pages of a cache.

    Args:
        limits: of steps and sequences.
        pages: how many the cache has for tokens in all layers.
        expected_share: the share of its max_new_tokens that a row is expected to generate; None: it is learnt as rows
            end.
        groups: of the model's layers.
    """

    def __init__(
        self, limits: StepLimits, pages: int, expected_share: float | None = None, groups: LayerGroups = ONE_GROUP
    ) -> None:
        self._limits, self._groups = limits, groups
        self.preemptions = 0
        self._tables = PageTables(limits, pages, groups)
        self._waiting: list[tuple[tuple[int, list[int]], int, Sequence]] = []  # sorted, the next one last
        self._preempted: deque[Sequence] = deque()  # these wait, too, before all others
        self._prefill_budget: PrefillBudget | None = None  # of those that wait; None: more may come
        self._free_slots = list(range(limits.slots - 1, -1, -1))
        self._prefilling: list[Sequence] = []
        self._decoding: list[Sequence] = []
        self._ending: set[Sequence] = set()  # nothing is left to plan, the last token has not been read yet
        # Of each slot, so that a step of thousands of sequences is planned at once: tokens that are or will be in the
        # cache without another one being generated; those of them that others had computed; the most to generate, and
        # how many of them remain; the adapter.
        numbers = np.zeros((5, limits.slots), np.int32)
        self._length, self._shared, self._max_new, self._remaining, self._adapters = numbers
        self._is_running = np.zeros(limits.slots, np.bool_)
        self._decoding_slots: Ints | None = None  # of `_decoding`, in order; None: they have changed
        self._page_ends: Ints | None = None  # of these, those whose next token begins a page; None: they have changed
        self._last_number = self._steps_to_next_try = 0
        self._lengths = ExpectedLengths(expected_share)

    @property
    def capacity(self) -> int:
        """Most tokens of a sequence that has the cache for itself."""
        return self._tables.capacity

    @property
    def pages(self) -> int:
        """How many pages the cache has for tokens in all layers."""
        return self._tables.pages

    @property
    def waiting(self) -> int:
        """How many sequences have no slot yet."""
        return len(self._waiting) + len(self._preempted)

    @property
    def running(self) -> int:
        """How many sequences have a slot."""
        return self._limits.slots - len(self._free_slots)

    def fits(self, prompt: Prompt) -> bool:
        """Whether the cache has room for the prompt and all that it may generate."""
        return len(prompt.tokens) + prompt.params.max_new_tokens <= self.capacity

    def add(self, prompts: Iterable[Prompt]) -> None:
        """These prompts wait. Each of them `fits`."""
        for prompt in prompts:
            sequence = Sequence(prompt, self._limits.find_adapter(prompt.adapter))
            self._last_number += 1
            self._waiting.append(((sequence.max_new_tokens, sequence.tokens), self._last_number, sequence))
        self._waiting.sort(key=lambda entry: entry[:2])

    def spread_prefill(self) -> None:
        """All prompts have been added: from now on those that wait may wait for as long as that delays nothing."""
        sizes = [(len(entry[2].tokens), entry[2].max_new_tokens) for entry in self._waiting]
        lengths, max_new_tokens = np.array(sizes, np.int32).reshape(-1, 2).T
        self._prefill_budget = PrefillBudget(lengths, max_new_tokens, self._tables.pages, self._groups)

    def must_preempt(self) -> bool:
        """Whether the next step has to preempt a sequence. All steps must have been read then: it is computed again."""
        return self._choose_preempted() is not None

    def plan(self) -> Step | None:
        """Plans the next step; None: there is nothing to compute until a step in flight has been read, or at all."""
        while (sequence := self._choose_preempted()) is not None:
            self._preempt(sequence)
            self.preemptions += 1
        draft = StepDraft()
        self._plan_decoding(draft)
        self._plan_prefill(draft)
        if not draft.tokens:
            return None
        step = draft.build(*self._tables.pop_changes(), self._adapters)
        self._give_back_passed(step)
        return step

    def finish(self, sequence: Sequence) -> None:
        """The sequence has ended and needs its slot no longer. What a step in flight still writes there comes before
        whatever a later step does with it."""
        if sequence in self._ending:
            self._ending.discard(sequence)
        else:
            self._decoding.remove(sequence)
            self._decoding_slots = self._page_ends = None
        self._release(sequence)
        self._lengths.learn(sequence.generated_tokens, sequence.max_new_tokens)

    def restart(self, pages: int) -> list[Prompt]:
        """All that runs waits again, for a new cache of `pages` pages; no step is in flight.

        Returns:
            Prompts that do not fit into that cache even alone; they wait no more.
        """
        running = sorted([*self._decoding, *self._prefilling, *self._ending], key=lambda sequence: -sequence.admission)
        for sequence in running:
            self._preempt(sequence)
        self._tables = PageTables(self._limits, pages, self._groups)
        all_waiting = [*self._preempted, *(entry[2] for entry in self._waiting)]
        self._preempted = deque(sequence for sequence in self._preempted if self.fits(sequence.prompt))
        self._waiting = [entry for entry in self._waiting if self.fits(entry[2].prompt)]
        if self._prefill_budget is not None:
            self.spread_prefill()
        return [sequence.prompt for sequence in all_waiting if not self.fits(sequence.prompt)]

    def _preempt(self, sequence: Sequence) -> None:
        """A sequence waits again, before all others, to be computed from its tokens so far."""
        for sequences in (self._decoding, self._prefilling):
            if sequence in sequences:
                sequences.remove(sequence)
        self._ending.discard(sequence)
        self._decoding_slots = self._page_ends = None
        self._release(sequence)
        sequence.position_tokens = self._limits.count_position_tokens(sequence.prompt_tokens, len(sequence.tokens))
        self._preempted.appendleft(sequence)
        self._steps_to_next_try = _STEPS_BETWEEN_TRIES

    def _release(self, sequence: Sequence) -> None:
        self._tables.release(sequence.slot)
        self._free_slots.append(sequence.slot)
        self._is_running[sequence.slot] = False
        sequence.slot = -1

    def _choose_preempted(self) -> Sequence | None:
        """A sequence whose keys all have other positions from the next token on; the newest one, if pages lack."""
        if self._limits.restretched_at is not None:
            places = np.flatnonzero(self._length[self._find_decoding_slots()] == self._limits.restretched_at)
            if len(places):
                return self._decoding[int(places[0])]
        if self._tables.can_extend(len(self._find_page_ends())):
            return None
        return max([*self._decoding, *self._prefilling], key=lambda sequence: sequence.admission)

    def _find_decoding_slots(self) -> Ints:
        if self._decoding_slots is None:
            slots = (sequence.slot for sequence in self._decoding)
            self._decoding_slots = np.fromiter(slots, np.int32, len(self._decoding))
        return self._decoding_slots

    def _find_page_ends(self) -> Ints:
        """Slots of the decoding sequences whose next token begins a page."""
        if self._page_ends is None:
            slots = self._find_decoding_slots()
            self._page_ends = slots[self._length[slots] % PAGE_SIZE == 0]
        return self._page_ends

    def _plan_decoding(self, draft: StepDraft) -> None:
        if not self._decoding:
            return
        slots = self._find_decoding_slots()
        self._tables.extend(self._find_page_ends())
        draft.decode(self._decoding, slots, self._length[slots])
        self._length[slots] += 1
        self._page_ends = None
        self._remaining[slots] -= 1
        last = np.flatnonzero(self._remaining[slots] == 0)
        if len(last):
            self._ending.update(self._decoding[place] for place in last.tolist())
            self._decoding = [self._decoding[place] for place in np.flatnonzero(self._remaining[slots]).tolist()]
            self._decoding_slots = self._page_ends = None

    def _give_back_passed(self, step: Step) -> None:
        """Once a step is planned, gives back what windows have passed before the next one: of sequences that begin a
        page then, and of those with a chunk, which may have taken pages for many more tokens than a window has."""
        if self._groups.windowed:
            slots = self._find_page_ends()
            self._tables.give_back_passed(slots, self._length[slots])
            for chunk in step.chunks:
                self._tables.give_back_passed(np.array([chunk.slot]), np.array([chunk.length]))

    def _plan_prefill(self, draft: StepDraft) -> None:
        step_tokens = self._limits.step_tokens
        for sequence in list(self._prefilling):
            if draft.tokens >= step_tokens or not self._plan_chunk(draft, sequence, step_tokens):
                return
        if self._steps_to_next_try and draft.tokens:
            self._steps_to_next_try -= 1
            return
        self._steps_to_next_try = 0
        if self.waiting and draft.tokens < (budget := self._choose_step_tokens(draft)):
            self._admit_waiting(draft, budget)

    def _admit_waiting(self, draft: StepDraft, budget: int) -> None:
        """Admits sequences that wait, until the step has `budget` tokens, or the next one has no room in the cache."""
        slots, remaining_of_running = self._expect_running()
        lengths = self._length[slots] - self._shared[slots]  # what another had computed already is counted there
        forecast = CacheForecast(self._tables.pages, lengths, remaining_of_running, self._groups)
        while draft.tokens < budget and (sequence := self._find_next_waiting()) is not None:
            prefix = self._tables.find_prefix(sequence)
            own = len(sequence.tokens) - prefix.tokens
            is_alone = self.running == 0  # then it has room, if only for one page after the other
            first = 1 if is_alone else self._groups.shorten_chunk(min(own, budget - draft.tokens))
            has_room = self._free_slots and self._tables.can_extend(-(-first // PAGE_SIZE))
            remaining = sequence.max_new_tokens - sequence.generated_tokens
            expected = int(self._lengths.expect(np.array([sequence.max_new_tokens]), np.array([remaining]))[0])
            if not has_room or not (is_alone or forecast.admit(own, expected)):
                self._tables.drop(prefix)
                self._steps_to_next_try = _STEPS_BETWEEN_TRIES
                return
            self._admit(sequence, prefix)
            self._plan_chunk(draft, sequence, budget)

    def _choose_step_tokens(self, draft: StepDraft) -> int:
        """Most tokens of a step that may admit sequences; they can wait, if they will end in time nevertheless."""
        if self._prefill_budget is None or self._preempted:
            return self._limits.step_tokens
        max_new_tokens = self._prefill_budget.max_new_tokens[: len(self._waiting)]
        slots, running_remaining = self._expect_running()
        tokens = self._prefill_budget.choose_step_tokens(
            self._lengths.expect(max_new_tokens, max_new_tokens), self._length[slots], running_remaining, draft.tokens
        )
        return min(self._limits.step_tokens, tokens or self._limits.step_tokens)

    def _expect_running(self) -> tuple[NDArray[np.int64], Ints]:
        """Slots of the sequences that run, and the tokens that each is expected to generate yet."""
        slots = np.flatnonzero(self._is_running)
        return slots, self._lengths.expect(self._max_new[slots], self._remaining[slots])

    def _find_next_waiting(self) -> Sequence | None:
        if self._preempted:
            return self._preempted[0]
        return self._waiting[-1][2] if self._waiting else None

    def _admit(self, sequence: Sequence, prefix: SharedPrefix) -> None:
        if self._preempted:
            self._preempted.popleft()
        else:
            self._waiting.pop()
        self._last_number += 1
        slot = sequence.slot = self._free_slots.pop()
        sequence.admission = self._last_number
        self._tables.begin(sequence, prefix)
        sequence.planned_tokens = prefix.tokens
        self._length[slot], self._shared[slot] = len(sequence.tokens), sequence.planned_tokens
        self._max_new[slot] = sequence.max_new_tokens
        self._remaining[slot] = sequence.max_new_tokens - sequence.generated_tokens
        self._is_running[slot], self._adapters[slot] = True, sequence.adapter
        self._prefilling.append(sequence)

    def _plan_chunk(self, draft: StepDraft, sequence: Sequence, budget: int) -> bool:
        """Plans as much of the sequence's prefill as the step and the cache have room for; False: there is none."""
        begin, slot = sequence.planned_tokens, sequence.slot
        end = min(len(sequence.tokens), begin + budget - draft.tokens, self._tables.count_room(slot))
        if end <= begin:
            return False
        self._tables.extend_one(slot, end)
        draft.prefill(sequence, begin, end)
        sequence.planned_tokens = end
        self._tables.remember(sequence, begin, min(end, sequence.prompt_tokens))
        if end == len(sequence.tokens):
            self._prefilling.remove(sequence)
            self._remaining[sequence.slot] -= 1
            if self._remaining[sequence.slot]:
                self._decoding.append(sequence)
                self._decoding_slots = self._page_ends = None
            else:
                self._ending.add(sequence)
        return True
