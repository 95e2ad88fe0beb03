"""Plans, carried out by `machine`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.step import Step
from tests.engines.paged.machine import Machine, lengths, make_scheduler, prompts


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
