"""Speed over time from batches that overlap, and a clock that leaves pauses out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from batchgen.report.batches import Batches, Clock, Speed, band, speed
from batchgen.report.plots import draw
from batchgen.report.rows import Rows
from tests.checkpoint.folders import batch, commit, made


def test_each_batch_is_read_with_its_file_and_the_seconds_of_its_rows(tmp_path: Path) -> None:
    folder = made(tmp_path, 20)
    first, _ = commit(folder, 1, 0, batch([0, 1], failed=[1]), batch([2, 3, 4]))
    commit(folder, 2, 1, batch([5]))
    batches = Batches.read(folder)
    table = batches.table
    assert list(table["finished"]) == sorted(table["finished"])
    assert sorted(zip(table["attempt"], table["rank"], table["rows"], table["failed"], strict=True)) == [
        (1, 0, 2, 1),
        (1, 0, 3, 0),
        (2, 1, 1, 0),
    ]
    lines = first.read_bytes().splitlines(keepends=True)
    begins = [sum(map(len, lines[:number])) for number in range(5)]
    assert batches.seconds_of(first, begins).tolist() == [0.5, 0.5, 1.5, 1.5, 1.5]
    assert np.isnan(batches.seconds_of(tmp_path / "another", [0])).all()


def test_area_under_the_speed_is_the_tokens_and_a_pause_breaks_the_line() -> None:
    table = np.zeros(3, dtype=[("finished", "f8"), ("seconds", "f8"), ("generated_tokens", "i8")])
    table["finished"], table["seconds"], table["generated_tokens"] = [110, 115, 1010], [10, 10, 10], [1000, 500, 2000]
    clock = Clock.of([(100, 120), (1000, 1010)])
    found = speed(table, clock, 30)
    assert np.nansum(found.rate) * found.width == pytest.approx(3500)
    assert found.rate[0] == pytest.approx(100)  # the first batch alone
    assert found.rate[7] == pytest.approx(150)  # and where the second overlaps it
    assert found.peak == pytest.approx(200)
    assert np.isnan(found.rate[20])
    assert clock.worked == 30
    assert clock.pauses == [(20, pytest.approx(20.9), 880)]  # drawn with 3 % of what was worked
    assert clock.at(np.array([100.0, 119.0, 500.0, 1005.0])) == pytest.approx([0, 19, 20, 25.9])


def test_median_is_of_the_steps_in_which_something_was_generated_alone() -> None:
    """Twenty minutes of 1,000 tokens a second, then five half hours in which attempts were killed as they loaded."""
    seconds = np.random.default_rng(0).uniform(0.3, 1.7, (8, 1200))
    seconds *= 1200 / seconds.sum(axis=1, keepdims=True)
    table = np.zeros(seconds.size + 1, dtype=[("finished", "f8"), ("seconds", "f8"), ("generated_tokens", "f8")])
    table["finished"][:-1] = 1.79e9 + np.cumsum(seconds, axis=1).ravel()
    table["seconds"][:-1], table["generated_tokens"][:-1] = seconds.ravel(), np.round(seconds.ravel() * 125)
    later = [1.79e9 + 2000 * number for number in range(1, 6)]
    table[-1] = (later[0] + 1700, 1700, 0)  # of failed rows alone
    found = speed(table, Clock.of([(1.79e9, 1.79e9 + 1200), *((at, at + 1800) for at in later)]))
    assert found.median == pytest.approx(1000, rel=0.01)
    assert np.nansum(found.rate > 0) == pytest.approx(1200 / found.width, abs=1)


def test_clock_of_no_attempt_has_one_place() -> None:
    assert Clock.of([]).at(np.array([1.79e9, 0.0])).tolist() == [0, 0]


def test_attempts_that_overlap_are_one_span_and_short_pauses_keep_their_length() -> None:
    clock = Clock.of([(0, 50), (40, 90), (91, 100), (60, 70)])
    assert clock.spans == [(0, 90), (91, 100)]
    assert clock.pauses == [(90, 91, 1)]
    assert clock.end == 100


def test_a_logarithmic_axis_has_numbers_that_a_browser_can_show() -> None:
    table = np.zeros(9, dtype=[("finished", "f8"), ("seconds", "f8"), ("prompt_tokens", "i8"), ("peak_memory", "f8")])
    table["seconds"], table["peak_memory"] = [1] * 8 + [1000], np.nan
    nothing = Speed(np.zeros(0), np.zeros(0), 1.0)
    (latency,) = draw(table, Clock.of([(0, 1)]), nothing, [], Rows())
    assert ">100</text>" in latency.svg
    assert "math" not in latency.svg


def test_band_leaves_out_steps_without_a_value() -> None:
    at = np.array([0.0, 0.0, 0.0, 10.0])
    found = band(at, np.array([1.0, 2.0, 9.0, 5.0]), 10)
    assert found.at.tolist() == [0.5, 9.5]
    assert found.middle.tolist() == [2, 5]
    assert found.highest.tolist() == [9, 5]
