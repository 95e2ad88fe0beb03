"""The forecast of the fullest moment, beside a simulation."""

from __future__ import annotations

import random

import numpy as np
import pytest

from batchgen.engines.paged.admission import CacheForecast
from batchgen.engines.paged.pages import PAGE_SIZE


def most_pages(rows: list[tuple[int, int]]) -> float:
    """Pages in the fullest step, with two standard deviations of how full the last pages are."""
    fullest = 0.0
    for step in range(max(rest for _, rest in rows) + 1):
        there = [length + step for length, rest in rows if rest >= step]
        fullest = max(fullest, sum(there) / PAGE_SIZE + len(there) / 2 + 2 * (len(there) / 12) ** 0.5)
    return fullest


@pytest.mark.parametrize("seed", range(20))
def test_fits_says_what_a_simulation_says(seed: int) -> None:
    source = random.Random(seed)
    rows = [(source.randrange(1, 300), source.randrange(200)) for _ in range(source.randrange(1, 30))]
    more = [(source.randrange(1, 300), source.randrange(200)) for _ in range(8)]
    pages = int(most_pages(rows) * source.uniform(1.0, 1.2))
    forecast = CacheForecast(pages, *(np.array(column, np.int32) for column in zip(*rows, strict=True)))
    answers = []
    for row in more:
        expected = most_pages([*rows, row]) <= pages
        assert forecast.admit(*row) == expected
        answers.append(expected)
        if expected:
            rows.append(row)


def test_short_rows_fit_where_long_ones_would_not() -> None:
    # A sequence of 64 tokens grows by 64: 9 pages in the end. 60 more tokens fit now, but not then.
    def forecast() -> CacheForecast:
        return CacheForecast(10, np.array([64], np.int32), np.array([64], np.int32))

    assert forecast().admit(60, 2)
    assert not forecast().admit(60, 60)
