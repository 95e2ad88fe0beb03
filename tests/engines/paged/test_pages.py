"""Pages: taken, shared, given back, and given up; and the tables of sequences, in groups with a window and without."""

from __future__ import annotations

import random

import numpy as np
import pytest

from batchgen.bench import workloads
from batchgen.engines.paged.layer_groups import ONE_GROUP, LayerGroups, LayerPlace
from batchgen.engines.paged.page_tables import PageTables, SharedPrefix
from batchgen.engines.paged.pages import GONE, PAGE_SIZE, ROOT, Pages
from batchgen.engines.paged.step import Sequence, StepLimits
from batchgen.models.footprint import LayerCacheShape
from batchgen.types import SamplingParams

BEGINNING = list(range(100, 100 + 3 * PAGE_SIZE))
HYBRID = LayerGroups(full=1, windowed=1, window=PAGE_SIZE)
WINDOWS = LayerGroups(full=0, windowed=1, window=PAGE_SIZE)


def remembered(pages: Pages, tokens: list[int]) -> list[int]:
    """The pages of a prompt of whole pages, computed by itself."""
    taken: list[int] = pages.take(len(tokens) // PAGE_SIZE).tolist()
    pages.remember(ROOT, tokens, [[page] for page in taken])
    return taken


def find(pages: Pages, tokens: list[int]) -> list[int]:
    """The pages of the prefix that `tokens` begin with."""
    return [own[0] for _, own in pages.find_path(tokens)]


def give_back(pages: Pages, numbers: list[int]) -> None:
    pages.give_back(np.array(numbers, np.int32))


def test_a_page_has_one_user_until_it_is_given_back() -> None:
    pages = Pages(3)
    taken = pages.take(3).tolist()
    assert sorted(taken) == [0, 1, 2]
    assert pages.available == 0
    give_back(pages, taken[:1])
    assert pages.take(1).tolist() == taken[:1]


def test_prompts_that_begin_alike_share_full_pages() -> None:
    pages = Pages(8)
    taken = remembered(pages, BEGINNING)
    shared = find(pages, [*BEGINNING[: 2 * PAGE_SIZE], 1, 2, 3])
    assert shared == taken[:2]
    pages.share(np.array(shared))
    give_back(pages, taken)
    assert pages.available == 8 - 2  # two still have a user


def test_the_last_token_is_always_computed() -> None:
    pages = Pages(8)
    taken = remembered(pages, BEGINNING)
    assert find(pages, BEGINNING) == taken[:2]
    assert find(pages, [*BEGINNING, 1]) == taken


def test_a_beginning_outlives_its_users_until_the_page_is_needed() -> None:
    pages = Pages(3)
    taken = remembered(pages, BEGINNING)
    give_back(pages, taken)
    assert pages.available == 3
    shared = find(pages, [*BEGINNING, 1])
    assert shared == taken
    pages.share(np.array(shared))
    assert pages.available == 0
    give_back(pages, shared)
    assert pages.take(1).tolist() == taken[2:]  # the end is given up before what it continues
    assert find(pages, [*BEGINNING, 1]) == taken[:2]


def test_a_page_that_was_given_up_is_not_found_under_what_it_was() -> None:
    pages = Pages(3)
    give_back(pages, remembered(pages, BEGINNING))
    other = [7] * (3 * PAGE_SIZE)
    remembered(pages, other)
    assert find(pages, [*BEGINNING, 1]) == []
    assert len(find(pages, [*other, 1])) == 3


def test_what_followed_a_beginning_that_was_given_up_does_not_follow_another() -> None:
    pages = Pages(2)
    first, second = remembered(pages, BEGINNING[: 2 * PAGE_SIZE])
    give_back(pages, [first])  # its user has gone on to something else, but somebody still has the second page
    assert pages.take(1).tolist() == [first]
    pages.remember(ROOT, [9] * PAGE_SIZE, [[first]])
    assert find(pages, [*[9] * PAGE_SIZE, *BEGINNING[PAGE_SIZE : 2 * PAGE_SIZE], 1]) == [first]
    assert second not in find(pages, [*BEGINNING, 1])


def test_a_prefix_without_a_page_of_a_full_group_is_forgotten_and_the_others_are_free_in_the_end() -> None:
    pages = Pages(4, full_groups=1)
    full, windowed = pages.take(2).tolist()
    pages.remember(ROOT, BEGINNING[:PAGE_SIZE], [[full, windowed]])
    give_back(pages, [full])
    assert full in pages.take(3).tolist()
    assert find(pages, BEGINNING) == []
    give_back(pages, [windowed])
    assert pages.take(1).tolist() == [windowed]
    assert pages.available == 0


def test_a_page_that_a_prefix_has_lost_is_replaced_by_that_of_another_sequence() -> None:
    pages = Pages(4, full_groups=1)
    first, second = pages.take(2).tolist(), pages.take(2).tolist()
    number = pages.remember(ROOT, BEGINNING[:PAGE_SIZE], [first])
    assert pages.remember(ROOT, BEGINNING[:PAGE_SIZE], [second]) == number
    assert pages.find_path(BEGINNING) == [(number, tuple(first))]
    give_back(pages, first[1:])
    assert pages.take(1).tolist() == first[1:]
    assert pages.find_path(BEGINNING) == [(number, (first[0], GONE))]
    assert pages.remember(ROOT, BEGINNING[:PAGE_SIZE], [second]) == number
    assert pages.find_path(BEGINNING) == [(number, (first[0], second[1]))]
    give_back(pages, second)
    assert pages.take(1).tolist() == second[:1]  # which no prefix has


@pytest.mark.parametrize("groups", [(1, 0), (1, 2), (0, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_no_page_is_lost_or_given_to_two(seed: int, groups: tuple[int, int]) -> None:
    """Sequences that begin alike grow, let go of what their window has passed, and end, in any order."""
    source = random.Random(seed)
    kinds = LayerGroups(*groups, window=20)
    tables = PageTables(StepLimits(12, 9 * PAGE_SIZE, 64), 20, kinds)
    free_slots, lengths = list(range(12)), {}
    for _ in range(1000):
        if lengths and source.random() < 0.3:
            slot = source.choice(list(lengths))
            del lengths[slot]
            free_slots.append(slot)
            tables.release(slot)
        elif lengths and source.random() < 0.5:
            slot = source.choice(list(lengths))
            lengths[slot] = end = min(9 * PAGE_SIZE, lengths[slot] + source.randrange(1, 20))
            if end > tables.count_room(slot):
                continue
            tables.extend_one(slot, end)
            tables.give_back_passed(np.array([slot]), np.array([end], np.int32))
        elif free_slots:
            tokens = [source.randrange(2) for _ in range(PAGE_SIZE)] * source.randrange(1, 5) + [5]
            sequence = make_sequence(tokens, free_slots[-1])
            prefix = tables.find_prefix(sequence)
            if not tables.can_extend(-(-len(tokens) // PAGE_SIZE) - prefix.columns):
                tables.drop(prefix)
                continue
            lengths[free_slots.pop()] = len(tokens)
            begin(tables, sequence, prefix)
        _check_users(tables, kinds, list(lengths))
    for slot in lengths:
        tables.release(slot)
    assert tables.available == 20 * kinds.count


def _check_users(tables: PageTables, groups: LayerGroups, slots: list[int]) -> None:
    """Each page has as many users as sequences have it, all for the same group; all others can be taken."""
    users: dict[int, set[int]] = {}
    counts = np.zeros(tables.pages * groups.count, np.int32)
    for slot in slots:
        for group in range(groups.count):
            first = tables._passed[slot] if groups.has_window(group) else 0
            for page in tables._tables[group, slot, first : tables._columns[slot]].tolist():
                counts[page] += 1
                users.setdefault(page, set()).add(group)
    assert all(len(each) == 1 for each in users.values())
    assert np.array_equal(tables._pages._users, counts)
    assert tables.available == (counts == 0).sum()


def make_sequence(tokens: list[int], slot: int = 0) -> Sequence:
    sequence = Sequence(workloads.prompt(0, tokens, SamplingParams()))
    sequence.slot = slot
    return sequence


def begin(tables: PageTables, sequence: Sequence, prefix: SharedPrefix | None = None) -> None:
    """Computes the prompt of a sequence in a single step."""
    prefix = prefix or tables.find_prefix(sequence)
    tables.begin(sequence, prefix)
    slots = np.array([sequence.slot])
    tables.extend_one(sequence.slot, len(sequence.tokens))
    tables.remember(sequence, prefix.tokens, len(sequence.tokens))
    tables.give_back_passed(slots, np.array([len(sequence.tokens)], np.int32))


@pytest.mark.parametrize("groups", [HYBRID, WINDOWS])
@pytest.mark.parametrize(
    ("given_up", "common", "shared"),
    [
        (0, 5, 5),
        (4, 5, 5),  # the next token sees the fifth page alone, which has a user
        (0, 3, 3),
        (1, 3, 3),  # the fourth page
        (2, 3, 2),  # the third page, too, which the next token would see
        (3, 3, 1),
        (4, 3, 0),
    ],
)
def test_a_prefix_is_shared_as_far_as_the_next_token_finds_its_window(
    groups: LayerGroups, given_up: int, common: int, shared: int
) -> None:
    tables = PageTables(StepLimits(4, 20 * PAGE_SIZE, 64), 9, groups)
    tokens = list(range(5 * PAGE_SIZE + 1))
    begin(tables, make_sequence(tokens))
    first = tables._tables[:, 0, :6].copy()
    # Four pages have been passed, and nobody else has them: they are given up, the last one first.
    tables._pages.take(tables._pages._free_count + given_up)
    prefix = tables.find_prefix(make_sequence([*tokens[: common * PAGE_SIZE], *[9] * PAGE_SIZE]))
    passed = max(0, shared - 1)  # of groups with a window the last page alone is shared
    assert (prefix.columns, prefix.passed) == (shared, passed)
    assert np.array_equal(prefix.pages[:, passed:], first[:, passed:shared] if shared else np.zeros((1, 0)))
    assert np.array_equal(
        prefix.pages[: groups.full], first[: groups.full, :shared] if shared else np.zeros((1, 0))[: groups.full]
    )
    assert tables.available == 4 - given_up - (0 if shared == 5 or not shared else 1)


def test_nodes_of_a_prefix_are_forgotten_with_their_last_page() -> None:
    for groups in (ONE_GROUP, HYBRID, WINDOWS):
        tables = PageTables(StepLimits(4, 20 * PAGE_SIZE, 64), 9, groups)
        for number in range(20):
            begin(tables, make_sequence([number] * (5 * PAGE_SIZE)))
            tables.release(0)
        tables._pages.take(tables._pages.available)
        pages = tables._pages
        assert not pages._nodes
        assert not pages._is_owned.any()
        assert pages._children == pages._keys == {}


SHAPE = LayerCacheShape(2, 8, 8)


@pytest.mark.parametrize(
    ("windows", "full", "windowed", "size"),
    [
        ([0] * 4, 1, 0, 4),
        ([9] * 4, 0, 1, 4),
        ([9, 0] * 3, 1, 1, 3),
        (([9] * 5 + [0]) * 10 + [9] * 2, 1, 6, 10),  # Gemma 3 27B
        ([0, 0, 9, 0, 0], 4, 1, 1),
        ([9, 0, 7, 0], 1, 0, 4),  # two windows
        ([99, 0], 1, 0, 2),  # no shorter than a sequence
        ([0] + [9] * 40, 1, 0, 41),  # too many groups
    ],
)
def test_layers_are_put_into_groups_of_one_size(windows: list[int], full: int, windowed: int, size: int) -> None:
    groups = LayerGroups.of([SHAPE] * len(windows), windows, longest=99)
    assert (groups.full, groups.windowed, groups.caches) == (full, windowed, size)
    assert len(set(groups.places)) == len(windows) == len(groups.places)  # each has a place of its own
    for window, place in zip(windows, groups.places, strict=True):
        assert place.cache < size
        assert place.group < groups.count
        assert groups.has_window(place.group) == (window > 0 and windowed > 0)


def test_layers_of_different_sizes_share_no_pages() -> None:
    groups = LayerGroups.of([SHAPE, LayerCacheShape(4, 8, 8)], [9, 0], longest=99)
    assert groups == LayerGroups(caches=2, places=(LayerPlace(0, 0), LayerPlace(0, 1)))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 24, 32, 100])
def test_a_page_has_been_passed_once_nothing_sees_it(window: int) -> None:
    groups = LayerGroups(0, 1, window)
    held = []
    for position in range(400):
        seen = {max(0, place) // PAGE_SIZE for place in range(position - window + 1, position + 1)}
        assert groups.count_passed(position) == min(seen | {position // PAGE_SIZE}) or min(seen) > position
        if position % PAGE_SIZE == 0:
            held.append(position // PAGE_SIZE + 1 - groups.count_passed(position))
    assert (
        max(held)
        == groups.window_columns
        == LayerCacheShape(1, 1, 1, window).count_tokens(9999, PAGE_SIZE) // PAGE_SIZE
    )
