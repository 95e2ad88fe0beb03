"""Plans for models whose layers have a window, carried out by `machine`."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from batchgen.engines.paged.layer_groups import LayerGroups
from batchgen.engines.paged.pages import PAGE_SIZE
from tests.engines.paged.machine import Machine, lengths, make_scheduler, prompts

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


def test_a_row_alone_begins_behind_a_prefix_although_its_window_is_still_held() -> None:
    # Of 56 pages, the second row shares 10 and 6 times 4. A chunk as long as the window would take 7 times 4 more, and
    # it has room for its 22 columns since it takes one after the other.
    groups = LayerGroups(full=1, windowed=6, window=64)
    first, second = prompts([(4, 3), (178, 2)], begin=list(range(10 * PAGE_SIZE)))
    scheduler = make_scheduler(slots=1, pages=8, sequence_tokens=400, step_tokens=100, groups=groups)
    assert scheduler.fits(second)
    scheduler.add([first, second])
    machine = Machine(scheduler)
    machine.run()
    assert machine.texts == {row.index: machine.expected(row) for row in (first, second)}
    assert machine.computed == len(first.tokens) + 2 + len(second.tokens) - 10 * PAGE_SIZE + 1


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
