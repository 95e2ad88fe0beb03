"""Shards, windows and order, for any input."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.engine import Stream
from batchgen.runs.schedule import WINDOW, open_rows, order, shard, windows
from batchgen.types import Prompt, SamplingParams, Shard

sizes = st.integers(0, 500)


def prompt(index: int, length: int, max_new_tokens: int = 8) -> Prompt:
    params = SamplingParams(max_new_tokens=max_new_tokens)
    return Prompt(index, str(index), index + 1, "", [0] * length, params, {})


def works(prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    return [(one.params.max_new_tokens, len(one.tokens)) for one in prompts]


prompt_lists = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3))).map(
    lambda pairs: [prompt(index, length, most) for index, (length, most) in enumerate(pairs)]
)


@given(rows=sizes, count=st.integers(1, 64))
def test_shards_partition_the_rows_evenly(rows: int, count: int) -> None:
    shards = [shard(rows, Stream(index, count, writes=True)) for index in range(count)]
    assert sorted(row for part in shards for row in part) == list(range(rows))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(rows=sizes, count=st.integers(1, 9), streams=st.integers(1, 9))
def test_the_streams_of_all_shards_partition_the_rows_too(rows: int, count: int, streams: int) -> None:
    parts = [
        shard(rows, Stream(stream, streams, writes=True), Shard(index, count))
        for index in range(count)
        for stream in range(streams)
    ]
    assert sorted(row for part in parts for row in part) == list(range(rows))


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_shards_overlap_if_a_row_is_in_both(count: int, other: int, data: st.DataObject) -> None:
    one, two = (Shard(data.draw(st.integers(0, most - 1)), most) for most in (count, other))
    assert one.overlaps(two) == bool(set(one.rows(count * other)) & set(two.rows(count * other)))
    assert Shard.parse(str(one)) == one


@pytest.mark.parametrize("text", ["", "3", "3/", "-1/3", "3/3", "0/0", "1/2/3", "a/b", "²/3", " 1/2"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no shard"):
        Shard.parse(text)


@given(rows=sizes, before=st.integers(1, 9), after=st.integers(1, 9), good=st.sets(st.integers(0, 499)))
def test_a_resume_with_other_streams_opens_each_open_row_once(
    rows: int, before: int, after: int, good: set[int]
) -> None:
    done = {row for row in shard(rows, Stream(0, before, writes=True)) if row in good}
    again = [
        row
        for index in range(after)
        for row in open_rows(shard(rows, Stream(index, after, writes=True)), done.__contains__)
    ]
    assert sorted(again) == sorted(set(range(rows)) - done)


@given(rows=sizes, step=st.integers(1, 5), good=st.sets(st.integers(0, 499)))
def test_open_rows_ascend(rows: int, step: int, good: set[int]) -> None:
    found = list(open_rows(range(0, rows, step), good.__contains__))
    assert found == [row for row in range(0, rows, step) if row not in good]


@given(rows=sizes, size=st.integers(1, 60))
def test_windows_are_the_rows_in_runs_of_one_size(rows: int, size: int) -> None:
    found = list(windows(range(rows), lambda row: 1, size))
    assert [row for window in found for row in window] == list(range(rows))
    assert all(len(window) == size for window in found[:-1])
    assert all(0 < len(window) <= size for window in found)


@given(lengths=st.lists(st.integers(0, 30)), most=st.integers(0, 60))
def test_windows_are_no_longer_than_memory_has_room_for(lengths: list[int], most: int) -> None:
    found = list(windows(range(len(lengths)), lengths.__getitem__, 5, most))
    assert [row for window in found for row in window] == list(range(len(lengths)))
    assert all(len(window) == 1 or sum(lengths[row] for row in window) <= most for window in found)
    for window, after in pairwise(found):
        assert len(window) == 5 or sum(lengths[row] for row in [*window, after[0]]) > most


def test_windows_are_read_one_after_the_other() -> None:
    taken: list[int] = []

    def rows() -> object:
        for row in range(10 * WINDOW):
            taken.append(row)
            yield row

    found = windows(rows(), lambda row: 1)  # type: ignore[arg-type]
    assert len(next(found)) == len(taken) == WINDOW


@given(prompts=prompt_lists, window=st.integers(0, 3))
def test_order_is_a_permutation(prompts: list[Prompt], window: int) -> None:
    assert sorted(one.index for one in order(prompts, window)) == [one.index for one in prompts]


@given(prompts=prompt_lists)
def test_order_goes_down_then_up_so_that_neighbouring_windows_meet_at_like_prompts(prompts: list[Prompt]) -> None:
    down, up = works(order(prompts, 0)), works(order(prompts, 1))
    assert down == sorted(down, reverse=True)
    assert up == sorted(up) == down[::-1]
    assert works(order(prompts, 2)) == down


@given(prompts=prompt_lists, window=st.integers(0, 1))
def test_prompts_of_equal_work_keep_their_order(prompts: list[Prompt], window: int) -> None:
    ordered = order(prompts, window)
    for one, other in pairwise(ordered):
        assert works([one]) != works([other]) or one.index < other.index


def test_tokens_to_generate_come_before_length() -> None:
    prompts = [prompt(0, 5, 8), prompt(1, 1, 9), prompt(2, 9, 8), prompt(3, 4, 9)]
    assert [one.index for one in order(prompts, 0)] == [3, 1, 2, 0]
