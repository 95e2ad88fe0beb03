"""A few seeds of the fuzzer; scripts/fuzz runs as many as there is time for."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.inputs import case

# A name deep in a table that was not UTF-8 came out again in a table that nobody could read.
ONCE_FAILED = (5000454,)


def test_the_flow_lives_through_damaged_files(tmp_path: Path) -> None:
    outcomes = set()
    for seed in (*range(40), *ONCE_FAILED):
        (tmp_path / str(seed)).mkdir()
        outcomes.add(case(seed, tmp_path / str(seed)))
    assert outcomes >= {"good", "rows failed", "refused"}
