"""Pages: taken, shared, given back, and given up."""

from __future__ import annotations

import random

import pytest

from batchgen.engines.paged.pages import PAGE_SIZE, Pages

BEGINNING = list(range(100, 100 + 3 * PAGE_SIZE))


def remembered(pages: Pages, tokens: list[int]) -> list[int]:
    """The pages of a prompt of whole pages, computed by itself."""
    taken = pages.take(len(tokens) // PAGE_SIZE)
    node = 0
    for number, page in enumerate(taken):
        node = pages.remember(node, tokens[number * PAGE_SIZE : (number + 1) * PAGE_SIZE], page)
    return taken


def test_a_page_has_one_user_until_it_is_given_back() -> None:
    pages = Pages(3)
    taken = pages.take(3)
    assert sorted(taken) == [0, 1, 2]
    assert pages.available == 0
    pages.give_back(taken[:1])
    assert pages.take(1) == taken[:1]


def test_prompts_that_begin_alike_share_full_pages() -> None:
    pages = Pages(8)
    taken = remembered(pages, BEGINNING)
    shared, _ = pages.find_prefix([*BEGINNING[: 2 * PAGE_SIZE], 1, 2, 3])
    assert shared == taken[:2]
    pages.give_back(taken)
    assert pages.available == 8 - 2  # two still have a user


def test_the_last_token_is_always_computed() -> None:
    pages = Pages(8)
    taken = remembered(pages, BEGINNING)
    assert pages.find_prefix(BEGINNING)[0] == taken[:2]
    assert pages.find_prefix([*BEGINNING, 1])[0] == taken


def test_a_beginning_outlives_its_users_until_the_page_is_needed() -> None:
    pages = Pages(3)
    taken = remembered(pages, BEGINNING)
    pages.give_back(taken)
    assert pages.available == 3
    shared, _ = pages.find_prefix([*BEGINNING, 1])
    assert shared == taken
    pages.give_back(shared)
    assert pages.take(1) == taken[2:]  # the end is given up before what it continues
    assert pages.find_prefix([*BEGINNING, 1])[0] == taken[:2]


def test_a_page_that_was_given_up_is_not_found_under_what_it_was() -> None:
    pages = Pages(3)
    pages.give_back(remembered(pages, BEGINNING))
    other = [7] * (3 * PAGE_SIZE)
    remembered(pages, other)
    assert pages.find_prefix([*BEGINNING, 1])[0] == []
    assert len(pages.find_prefix([*other, 1])[0]) == 3


def test_what_followed_a_beginning_that_was_given_up_does_not_follow_another() -> None:
    pages = Pages(2)
    first, second = remembered(pages, BEGINNING[: 2 * PAGE_SIZE])
    pages.give_back([first])  # its user has gone on to something else, but somebody still has the second page
    assert pages.take(1) == [first]
    pages.remember(0, [9] * PAGE_SIZE, first)
    assert pages.find_prefix([*[9] * PAGE_SIZE, *BEGINNING[PAGE_SIZE : 2 * PAGE_SIZE], 1])[0] == [first]
    assert second not in pages.find_prefix([*BEGINNING, 1])[0]


@pytest.mark.parametrize("seed", range(5))
def test_no_page_is_lost_or_given_to_two(seed: int) -> None:
    source = random.Random(seed)
    pages = Pages(40)
    held: list[tuple[list[int], int]] = []  # pages of a prompt, and how many of them others may have too
    for _ in range(400):
        if held and source.random() < 0.5:
            pages.give_back(held.pop(source.randrange(len(held)))[0])
            continue
        tokens = [source.randrange(2) for _ in range(PAGE_SIZE)] * source.randrange(1, 4) + [5]
        shared, node = pages.find_prefix(tokens)
        if len(tokens) // PAGE_SIZE - len(shared) > pages.available:
            pages.give_back(shared)
            continue
        own = pages.take(len(tokens) // PAGE_SIZE - len(shared))
        for number, page in enumerate(own, len(shared)):
            node = pages.remember(node, tokens[number * PAGE_SIZE : (number + 1) * PAGE_SIZE], page)
        elsewhere = {page for others, _ in held for page in others}
        assert elsewhere.isdisjoint(own)
        held.append((shared + own, len(shared)))
    for kept, _ in held:
        pages.give_back(kept)
    assert pages.available == 40
