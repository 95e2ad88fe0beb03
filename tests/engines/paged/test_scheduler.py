"""Plans, carried out on a cache that remembers what each place of a page holds: the beginning that led to it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest

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
        self._table: dict[int, int] = {}
        self._places: dict[tuple[int, int], tuple[int, int]] = {}  # page, place → of which group, and what is there
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
        for slot, position, token in tokens:
            if token >= 0:  # another sequence may have the slot now, and begin with pages that are there already
                self._texts[slot] = self._text(step, slot)[: position + 1]
                self._beginnings[slot] = list(accumulate(self._texts[slot], lambda *both: hash(both), initial=0))
            else:
                self._texts[slot].append(self._last[slot])
                self._beginnings[slot].append(hash((self._beginnings[slot][-1], self._last[slot])))
            assert len(self._texts[slot]) == position + 1
            for group in range(self._groups.count):
                self._places[self._at(group, slot, position)] = group, self._beginnings[slot][-1]
        for slot, position, _ in tokens:
            for group in range(self._groups.count):
                first = max(0, position + 1 - self._groups.window) if group >= self._groups.full else 0
                for place in range(first, position + 1):
                    there = self._places[self._at(group, slot, place)]
                    assert there == (group, self._beginnings[slot][place + 1]), (group, slot, place)
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

    def _at(self, group: int, slot: int, position: int) -> tuple[int, int]:
        limits = self.scheduler._limits
        row = group * (limits.slots + 1) + slot
        return self._table[row * limits.table_width + position // PAGE_SIZE], position % PAGE_SIZE

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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "sizes",
    [
        {"slots": 64, "pages": 1000, "step_tokens": 256},
        {"slots": 5, "pages": 1000, "step_tokens": 17},
        {"slots": 64, "pages": 14, "step_tokens": 64, "expected_share": 0.05},  # far too hopeful
        {"slots": 1, "pages": 12, "step_tokens": 8},
    ],
    ids=["ample", "chunks", "tight", "alone"],
)
def test_every_row_is_generated_as_if_it_were_alone(seed: int, sizes: dict[str, int]) -> None:
    rows = prompts(lengths(seed), begin=list(range(seed * 10)))
    scheduler = make_scheduler(sequence_tokens=240, **sizes)
    machine = Machine(scheduler, ends=lambda token: token == 7)
    scheduler.add(rows[:30])
    scheduler.add(rows[30:])
    machine.run()
    assert machine.texts == {row.index: machine.expected(row) for row in rows}
    assert scheduler._tables.available == sizes["pages"]
    assert (scheduler.preemptions > 0) == ("expected_share" in sizes)


HYBRID = LayerGroups(full=1, windowed=2, window=24)  # its window ends within a page
MANY = LayerGroups(full=1, windowed=6, window=32)
WINDOWS = LayerGroups(full=0, windowed=1, window=17)
SMALLEST = LayerGroups(full=2, windowed=1, window=1)


@pytest.mark.parametrize("groups", [HYBRID, MANY, WINDOWS, SMALLEST], ids=["hybrid", "many", "windows", "smallest"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"slots": 64, "pages": 1000, "step_tokens": 256},
        {"slots": 5, "pages": 1000, "step_tokens": 17},
        {"slots": 64, "pages": 9, "step_tokens": 64, "expected_share": 0.05},  # far too hopeful
        {"slots": 1, "pages": 12, "step_tokens": 100},
        {"slots": 20, "pages": 40, "step_tokens": 40},
    ],
    ids=["ample", "chunks", "tight", "alone", "some"],
)
def test_every_row_is_generated_with_layers_that_have_a_window(groups: LayerGroups, sizes: dict[str, int]) -> None:
    rows = prompts(lengths(groups.count), begin=list(range(40)))
    rows += [replace(rows[number], index=60 + number, sample=1) for number in range(9)]
    scheduler = make_scheduler(sequence_tokens=240, groups=groups, **sizes)
    machine = Machine(scheduler, ends=lambda token: token == 7)
    scheduler.add(rows[:30])
    scheduler.add(rows[30:])
    machine.run()
    assert machine.texts == {row.index: machine.expected(row) for row in rows}
    assert scheduler._tables.available == sizes["pages"] * groups.count
    # With windows alone, all pages that a sequence will ever have count from the beginning.
    assert (scheduler.preemptions > 0) == ("expected_share" in sizes and groups.full > 0)


@pytest.mark.parametrize("seed", range(25))
def test_random_sizes_with_and_without_windows(seed: int) -> None:
    source = random.Random(seed)
    groups = LayerGroups(source.randrange(2), source.randrange(1, 4), source.randrange(1, 70))
    pages = source.randrange(8, 60)
    sizes = {"slots": source.randrange(1, 30), "pages": pages, "step_tokens": source.randrange(1, 150)}
    share = source.choice([None, 0.05, 1.0])
    rows = prompts(lengths(seed, 40), begin=list(range(source.randrange(100))))
    scheduler = make_scheduler(sequence_tokens=300, expected_share=share, groups=groups, **sizes)  # type: ignore[arg-type]
    machine = Machine(scheduler, ends=lambda token: token % 25 == 7)
    fitting = [row for row in rows if scheduler.fits(row)]
    assert fitting
    scheduler.add(fitting)
    if seed % 2:
        scheduler.spread_prefill()
    machine.run()
    assert machine.texts == {row.index: machine.expected(row) for row in fitting}
    assert scheduler._tables.available == pages * groups.count


def test_a_row_that_fits_only_since_windows_let_go_is_generated_alone() -> None:
    rows = prompts([(700, 100)])
    limits = {"slots": 4, "sequence_tokens": 1000, "step_tokens": 300}
    assert not make_scheduler(pages=20, **limits).fits(rows[0])
    for groups, pages in ((HYBRID, 19), (WINDOWS, 2)):
        scheduler = make_scheduler(pages=pages, groups=groups, **limits)
        assert scheduler.fits(rows[0])
        smaller = make_scheduler(pages=pages - 1, groups=groups, **limits)
        assert not smaller.fits(rows[0])
        scheduler.add(rows)
        machine = Machine(scheduler)
        machine.run()
        assert machine.texts == {0: machine.expected(rows[0])}
        assert scheduler.preemptions == 0


def test_a_forecast_with_windows_admits_more_and_needs_no_preemption() -> None:
    at_once = []
    for groups in (LayerGroups(full=3), HYBRID):
        scheduler = make_scheduler(
            slots=64, pages=60, sequence_tokens=400, step_tokens=128, expected_share=1.0, groups=groups
        )
        scheduler.add(prompts([(150, 60)] * 40))
        machine = Machine(scheduler)
        machine.run()
        assert len(machine.texts) == 40
        assert scheduler.preemptions == 0
        at_once.append(max(machine.decoding))
    assert at_once[1] > 1.5 * at_once[0]


def test_a_common_beginning_is_shared_where_windows_have_passed_most_of_it() -> None:
    begin = list(range(6 * PAGE_SIZE))
    rows = prompts([(5, 3)] * 20, begin=begin)
    scheduler = make_scheduler(slots=32, pages=100, sequence_tokens=240, step_tokens=1000, groups=HYBRID)
    scheduler.add(rows)
    machine = Machine(scheduler)
    machine.run()
    assert machine.computed == len(begin) + 20 * (5 + 2)
    assert machine.texts == {row.index: machine.expected(row) for row in rows}


def test_a_forecast_that_holds_needs_no_preemption() -> None:
    rows = prompts(lengths(3))
    scheduler = make_scheduler(slots=64, pages=40, sequence_tokens=240, step_tokens=128, expected_share=1.0)
    scheduler.add(rows)
    machine = Machine(scheduler)
    machine.run()
    assert len(machine.texts) == len(rows)
    assert scheduler.preemptions == 0
    assert max(machine.decoding) > 5  # many at once all the same


def test_a_common_beginning_is_computed_once() -> None:
    begin = list(range(4 * PAGE_SIZE))
    rows = prompts([(5, 3)] * 20, begin=begin)
    scheduler = make_scheduler(slots=32, pages=100, sequence_tokens=240, step_tokens=1000)
    scheduler.add(rows)
    machine = Machine(scheduler)
    machine.run()
    assert machine.computed == len(begin) + 20 * (5 + 2)  # the last new token is never computed


def test_samples_of_a_row_share_the_pages_of_its_prompt_also_within_a_step() -> None:
    rows = prompts([(70, 4)])
    rows = [replace(rows[0], sample=sample, index=sample) for sample in range(8)]
    for step_tokens in (1000, 30):
        scheduler = make_scheduler(slots=32, pages=100, sequence_tokens=240, step_tokens=step_tokens)
        scheduler.add(rows)
        machine = Machine(scheduler)
        machine.run()
        assert machine.computed == 70 + 7 * (70 - 4 * PAGE_SIZE) + 8 * 3
        assert machine.texts == {row.index: machine.expected(row) for row in rows}


@pytest.mark.parametrize(
    "sizes",
    [
        {"slots": 64, "pages": 1000, "step_tokens": 256},
        {"slots": 5, "pages": 1000, "step_tokens": 17},
        {"slots": 64, "pages": 14, "step_tokens": 20, "expected_share": 0.05},
    ],
    ids=["ample", "chunks", "tight"],
)
def test_prompts_whose_own_logprobs_are_wanted_are_computed_whole_and_looked_at_once(sizes: dict[str, int]) -> None:
    rows = prompts(lengths(2, 30), begin=list(range(40)))
    asking = [replace(row, params=replace(row.params, prompt_logprobs=0)) for row in rows[::2]]
    rows[::2] = asking
    scheduler = make_scheduler(sequence_tokens=240, **sizes)
    machine = Machine(scheduler)
    scheduler.add(rows)
    machine.run()
    assert machine.scored == {row.index: list(range(1, len(row.tokens))) for row in asking}
    assert machine.texts == {row.index: machine.expected(row) for row in rows}
    assert (scheduler.preemptions > 0) == ("expected_share" in sizes)


def test_what_the_other_ranks_of_a_group_are_told_of_a_step_is_what_they_read() -> None:
    rows = prompts([(40, 5), (3, 9)])
    rows[0].params = replace(rows[0].params, prompt_logprobs=3, temperature=1.0)
    scheduler = make_scheduler(slots=4, pages=100, sequence_tokens=240, step_tokens=30)
    scheduler.add(rows)
    seen = []
    for _ in range(4):
        step = scheduler.plan()
        assert step is not None
        told = Step.unpack(step.pack())
        assert np.array_equal(told.pack(), step.pack())
        assert (told.needs_chooser, told.chunks, told.sequences) == (step.needs_chooser, step.chunks, [])
        seen.append((len(told.prompt_rows), told.needs_chooser))
    assert {count > 0 for count, _ in seen} == {flag for _, flag in seen} == {True, False}


def test_a_step_has_no_more_tokens_than_its_budget() -> None:
    scheduler = make_scheduler(slots=8, pages=200, sequence_tokens=600, step_tokens=50)
    scheduler.add(prompts([(500, 4), (3, 40), (120, 4)]))
    machine = Machine(scheduler)
    machine.run()
    assert max(machine.sizes) == 50
    assert len(machine.texts) == 3


def test_those_with_the_most_to_generate_come_first() -> None:
    rows = prompts([(4, 5), (4, 50), (4, 20)])
    scheduler = make_scheduler(slots=1, pages=100, sequence_tokens=240, step_tokens=64)
    scheduler.add(rows)
    machine = Machine(scheduler)
    machine.run()
    assert list(machine.texts) == [1, 2, 0]


def test_prompts_are_spread_over_the_steps_that_the_longest_row_needs() -> None:
    rows = prompts([(100, 400)] * 10 + [(100, 20)] * 600)
    sizes = {}
    for spread in (False, True):
        machine = Machine(make_scheduler(slots=700, pages=6000, sequence_tokens=512, step_tokens=2048))
        machine.scheduler.add(rows)
        if spread:
            machine.scheduler.spread_prefill()
        machine.run()
        assert sorted(machine.texts) == list(range(len(rows)))
        sizes[spread] = machine.sizes
    # Unspread, 30 full steps are followed by hundreds with ten rows in them.
    assert sum(size <= 10 for size in sizes[False]) > 300
    assert sum(size <= 10 for size in sizes[True]) < 280
    assert len(sizes[True]) <= len(sizes[False]) + 1
    assert max(sizes[True][2:]) <= 512 < max(sizes[False][2:])


def test_prompts_do_not_wait_where_the_cache_is_what_a_job_waits_for() -> None:
    sizes = []
    for spread in (False, True):
        machine = Machine(make_scheduler(slots=700, pages=400, sequence_tokens=512, step_tokens=2048))
        machine.scheduler.add(prompts([(100, 400)] * 10 + [(100, 20)] * 600))
        if spread:
            machine.scheduler.spread_prefill()
        machine.run()
        sizes.append(machine.sizes)
    # The last of them do, since a cache that is half empty is not what they wait for.
    assert sizes[0][:500] == sizes[1][:500]
    assert len(sizes[1]) <= len(sizes[0]) + 1


def test_rows_of_one_length_all_begin_at_once() -> None:
    machine = Machine(make_scheduler(slots=200, pages=2000, sequence_tokens=512, step_tokens=2048))
    machine.scheduler.add(prompts([(20, 50)] * 100))
    machine.scheduler.spread_prefill()
    machine.run()
    assert machine.sizes[0] == 2000
    assert len(machine.sizes) == 50


def test_what_rows_generate_is_learnt() -> None:
    def most_at_once(ends: Callable[[int], bool]) -> int:
        scheduler = make_scheduler(slots=256, pages=100, sequence_tokens=1000, step_tokens=256)
        scheduler.add(prompts([(3, 400)] * 200))
        machine = Machine(scheduler, ends)
        machine.run()
        return max(machine.decoding)

    # Rows that end early leave room for more at once than rows that are as long as they may be.
    assert most_at_once(lambda token: token % 4 == 0) > 3 * most_at_once(lambda token: False)


def test_a_restart_with_fewer_pages_computes_again_and_names_what_no_longer_fits() -> None:
    rows = prompts([*lengths(5, 20), (90, 59)])
    scheduler = make_scheduler(slots=32, pages=100, sequence_tokens=240, step_tokens=64)
    machine = Machine(scheduler)
    scheduler.add(rows)
    for _ in range(8):
        step = scheduler.plan()
        assert step is not None
        machine._read(step, machine._compute(step))
    assert scheduler.plan() is not None  # in flight, and lost
    refused = scheduler.restart(9)
    assert [row.index for row in refused] == [20]
    machine._texts.clear()
    machine.run()
    assert machine.texts == {row.index: machine.expected(row) for row in rows[:20]}
