"""Plans, carried out on a cache that remembers what each place of a page holds: the beginning that led to it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import accumulate, groupby

from batchgen.bench import workloads
from batchgen.engines.paged.layer_groups import ONE_GROUP, LayerGroups
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.scheduler import Scheduler
from batchgen.engines.paged.step import Step, StepLimits
from batchgen.types import Prompt, SamplingParams


def prompts(lengths: Sequence[tuple[int, int]], begin: Sequence[int] = ()) -> list[Prompt]:
    """Rows of prompt and new tokens; the prompts begin with `begin`."""
    source = random.Random(1)
    return [
        workloads.prompt(
            number, [*begin, *(source.randrange(50) for _ in range(length))], SamplingParams(max_new_tokens=new)
        )
        for number, (length, new) in enumerate(lengths)
    ]


def make_scheduler(
    *,
    slots: int,
    pages: int,
    sequence_tokens: int,
    step_tokens: int,
    expected_share: float | None = None,
    groups: LayerGroups = ONE_GROUP,
) -> Scheduler:
    return Scheduler(StepLimits(slots, sequence_tokens, step_tokens), pages, expected_share, groups)


class Machine:
    """A model whose next token follows from the beginning, over a cache that is checked at every step."""

    def __init__(self, scheduler: Scheduler, ends: Callable[[int], bool] = lambda token: False) -> None:
        self.scheduler, self._groups = scheduler, scheduler._groups
        self._ends = ends
        self._slots, self._width = scheduler._limits.slots + 1, scheduler._limits.table_width
        self._table: dict[int, int] = {}
        self._pages: dict[int, tuple[int, list[int]]] = {}  # page → of which group, and what is at each of its places
        self.most_used = 0  # pages at once
        self._last: dict[int, int] = {}  # slot → its newest token, as the device knows it
        self._texts: dict[int, list[int]] = {}  # slot → its tokens, as the device knows them
        self._beginnings: dict[int, list[int]] = {}  # slot → what stands for each of their beginnings
        self.texts: dict[int, list[int]] = {}
        self.sizes: list[int] = []
        self.decoding: list[int] = []
        self.computed = 0
        self.scored: dict[int, list[int]] = {}  # row → the positions of its prompt whose log-probabilities were found

    def run(self) -> None:
        """Until nothing is left, one step always in flight."""
        in_flight: tuple[Step, list[int]] | None = None
        while True:
            if in_flight is not None and self.scheduler.must_preempt():
                self._read(*in_flight)
                in_flight = None
            step = self.scheduler.plan()
            following = (step, self._compute(step)) if step is not None else None
            if in_flight is not None:
                self._read(*in_flight)
            in_flight = following
            if in_flight is None and not self.scheduler.running and not self.scheduler.waiting:
                return

    def _compute(self, step: Step) -> list[int]:
        self._check_use()
        self._table |= dict(zip(step.table_places.tolist(), step.table_pages.tolist(), strict=True))
        self.sizes.append(len(step.slots))
        self.decoding.append(step.decoding)
        self.computed += len(step.slots)
        tokens = list(zip(step.slots.tolist(), step.positions.tolist(), step.ids.tolist(), strict=True))
        computed = []
        for slot, tokens_of_slot in groupby(tokens, key=lambda each: each[0]):
            positions, ids = zip(*((position, token) for _, position, token in tokens_of_slot), strict=True)
            self._extend(step, slot, positions, ids)
            computed.append((slot, positions))
        for slot, positions in computed:
            self._check_what_is_seen(slot, positions)
        scored = [tokens[row][1] + 1 for row in step.prompt_rows.tolist()]
        assert scored == [place for part in step.prompt_parts for place in range(part.begin, part.end)]
        assert [tokens[row][0] for row in step.prompt_rows.tolist()] == [
            part.sequence.slot for part in step.prompt_parts for _ in range(part.begin, part.end)
        ]
        next_tokens = []
        for row in step.rows.tolist():
            slot, position, _ = tokens[row]
            self._last[slot] = self.next(self._texts[slot][: position + 1])
            next_tokens.append(self._last[slot])
        return next_tokens

    def _text(self, step: Step, slot: int) -> list[int]:
        """Of the sequence whose prompt is computed there."""
        (sequence,) = [each for each in self.scheduler._prefilling + step.sequences if each.slot == slot]
        return sequence.tokens

    def _extend(self, step: Step, slot: int, positions: Sequence[int], ids: Sequence[int]) -> None:
        """Writes what stands for the beginnings that end at `positions`, which follow one another, to their places."""
        assert list(positions) == list(range(positions[0], positions[-1] + 1))
        if ids[0] >= 0:  # another sequence may have the slot now, and begin with pages that are there already
            self._texts[slot] = self._text(step, slot)[: positions[-1] + 1]
            self._beginnings[slot] = list(accumulate(self._texts[slot], lambda *both: hash(both), initial=0))
        else:
            self._texts[slot].append(self._last[slot])
            self._beginnings[slot].append(hash((self._beginnings[slot][-1], self._last[slot])))
        assert len(self._texts[slot]) == positions[-1] + 1
        for group in range(self._groups.count):
            for position in positions:
                page = self._page(group, slot, position // PAGE_SIZE)
                owner, held = self._pages.get(page, (-1, []))
                if owner != group:  # the layers of a group overwrite what those of another one had there
                    owner, held = self._pages[page] = group, [0] * PAGE_SIZE
                held[position % PAGE_SIZE] = self._beginnings[slot][position + 1]

    def _check_what_is_seen(self, slot: int, positions: Sequence[int]) -> None:
        """All that the tokens at `positions` look back to is in its place."""
        for group in range(self._groups.count):
            place, end = 0, positions[-1] + 1
            if group >= self._groups.full:
                place = max(0, positions[0] + 1 - self._groups.window)
            while place < end:
                column, within = divmod(place, PAGE_SIZE)
                count = min(end - place, PAGE_SIZE - within)
                owner, held = self._pages[self._page(group, slot, column)]
                expected = self._beginnings[slot][place + 1 : place + 1 + count]
                assert (owner, held[within : within + count]) == (group, expected), (group, slot, place)
                place += count

    def _page(self, group: int, slot: int, column: int) -> int:
        return self._table[(group * self._slots + slot) * self._width + column]

    def _check_use(self) -> None:
        """Once a step is planned, sequences have no more pages than the next one sees."""
        scheduler, groups = self.scheduler, self._groups
        planned = [sequence.planned_tokens for sequence in scheduler._prefilling]
        going_on = [*scheduler._decoding, *scheduler._ending]
        lengths = [*planned, *(int(scheduler._length[sequence.slot]) for sequence in going_on)]
        columns = [-(-length // PAGE_SIZE) for length in lengths]
        within = [min(each, -(-(groups.window - 1) // PAGE_SIZE) + 1) for each in columns]
        # The last token of a sequence that is about to end is never computed.
        used = scheduler.pages * groups.count - scheduler._tables.available
        assert used <= groups.full * sum(columns) + groups.windowed * sum(within)
        self.most_used = max(self.most_used, used)

    @staticmethod
    def next(text: Sequence[int]) -> int:
        """The token that follows."""
        return hash(tuple(text[-9:])) % 50

    def _read(self, step: Step, next_tokens: list[int]) -> None:
        for part in step.prompt_parts:
            found = self.scored.setdefault(part.sequence.prompt.index, [])
            assert not part.sequence.has_prompt_logprobs
            assert part.begin in (1, len(found) + 1)
            found[part.begin - 1 :] = range(part.begin, part.end)
            part.sequence.has_prompt_logprobs = part.end == part.sequence.prompt_tokens
        for sequence, token in zip(step.sequences, next_tokens, strict=True):
            if sequence.slot < 0:
                continue
            sequence.tokens.append(token)
            new = sequence.tokens[sequence.prompt_tokens :]
            if self._ends(token) or len(new) == sequence.max_new_tokens:
                self.scheduler.finish(sequence)
                assert sequence.prompt.index not in self.texts
                self.texts[sequence.prompt.index] = new

    def expected(self, prompt: Prompt) -> list[int]:
        """The text of a prompt alone."""
        text = list(prompt.tokens)
        while len(text) < len(prompt.tokens) + prompt.params.max_new_tokens:
            text.append(self.next(text))
            if self._ends(text[-1]):
                break
        return text[len(prompt.tokens) :]


def lengths(seed: int, count: int = 60) -> list[tuple[int, int]]:
    source = random.Random(seed)
    return [(source.randrange(1, 90), source.randrange(1, 60)) for _ in range(count)]
