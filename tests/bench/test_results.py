"""Results, their arithmetic and their tables."""

from __future__ import annotations

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from batchgen.bench import tables
from batchgen.bench.results import BenchError, Folder, Result

ASKED = {"model": "m", "dtype": "float32", "tokens": 10, "cycles": 3, "job": None, "job_tokens": [0, 0]}
GOOD = Result(
    "accelerate",
    1,
    "seed",
    8,
    "ok",
    load_seconds=2.0,
    streams=1,
    rows=8,
    fits=8,
    generated=60,
    counted_by_seed=80,
    seconds=[3.0, 1.0, 2.0],
    prefill_seconds=0.2,
    floor_seconds=0.5,
    host_bytes=2 * 10**9,
)


def folder(path: Path, *results: Result) -> Folder:
    made = Folder(path)
    made.check_or_create(ASKED)
    for result in results:
        made.add(result)
    return made


def test_a_row_that_ends_early_is_counted_to_its_end_and_by_the_seed_with_its_padding() -> None:
    assert (GOOD.per_second(), GOOD.per_second("seed")) == (30.0, 40.0)
    assert GOOD.milliseconds() == pytest.approx(1000 * 2 / 60)
    assert GOOD.milliseconds("seed") == pytest.approx(25.0)


def test_results_come_back_as_they_were_and_the_last_of_a_cell_counts(tmp_path: Path) -> None:
    kept = folder(tmp_path, GOOD, replace(GOOD, batch=16, outcome="oom", seconds=[]), replace(GOOD, generated=70))
    assert [(one.batch, one.generated, one.outcome) for one in kept.results()] == [(8, 70, "ok"), (16, 60, "oom")]


def test_another_bench_does_not_go_into_the_same_folder(tmp_path: Path) -> None:
    kept = folder(tmp_path)
    kept.check_or_create(ASKED)
    with pytest.raises(BenchError, match="holds another bench: tokens was 10, now 20"):
        kept.check_or_create(ASKED | {"tokens": 20})


def test_two_that_measure_at_once_lose_no_command_of_the_other(tmp_path: Path) -> None:
    kept = folder(tmp_path)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(kept.remember, map(str, range(40))))
    assert sorted(map(int, kept.read_manifest()["commands"])) == list(range(40))


def test_tables_show_every_cell_and_the_seeds_figure_on_request(tmp_path: Path) -> None:
    worse = replace(GOOD, system="ds-zero", ranks=2, seconds=[4.0], load_seconds=5.0)
    oom = Result("ds-zero", 2, "seed", 64, "oom", load_seconds=5.0, fits=32)
    job = replace(GOOD, job="mixed, 8 rows", batch=None, prefill_seconds=None)
    kept = folder(tmp_path, GOOD, worse, oom, job)
    path = tables.write(kept, "generated")
    text = path.read_text()
    assert "| system | ranks | 8 | 64 |" in text
    assert "| accelerate | 1 | 33.333 |  |" in text
    assert "| ds-zero | 2 | 66.667 | oom |" in text
    # (2 s - 0.2 s) over the 9 steps behind the first token.
    assert "| accelerate | 1 | 8 | 30 | 200.0 | 200.00 | 25% |  | 2.0 |" in text
    assert "| accelerate | 1 | mixed, 8 rows | 8 | 60 | 2.0 | 30 | 8 |  | 2.0 |" in text
    assert "| accelerate | 1 | 25.000 |  |" in tables.write(kept, "seed").read_text()
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["outcome"] for row in rows] == ["ok", "ok", "oom", "ok"]
    assert float(rows[0]["tokens_per_second"]) == 40.0
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")


def test_the_header_says_the_size_of_the_model_where_it_was_recorded(tmp_path: Path) -> None:
    made = folder(tmp_path, GOOD)
    assert tables.markdown(made.read_manifest(), [GOOD], "generated").startswith("m, float32, 10 new tokens, ")
    made.describe({"model_size": "30.5 B parameters"})
    described = tables.markdown(made.read_manifest(), [GOOD], "generated")
    assert described.startswith("m (30.5 B parameters), float32, 10 new tokens, ")


def test_a_batch_that_was_not_in_work_as_a_whole_says_so_beside_its_speed(tmp_path: Path) -> None:
    some = replace(GOOD, batch=2048, fits=1100)
    unknown = replace(GOOD, batch=16, fits=None)  # no rank could tell
    text = tables.write(folder(tmp_path, GOOD, some, unknown), "generated").read_text()
    details = text.split("| tokens/s | prefill, ms |")[1]
    batches = [line.split(" | ")[2] for line in details.splitlines() if line.startswith("| accelerate |")]
    assert batches == ["8", "16", "2048 (1100 at once)"]
    assert "| system | ranks | 8 | 16 | 2048 |" in text


def test_more_ranks_are_compared_with_the_fewest_cell_by_cell(tmp_path: Path) -> None:
    two = replace(GOOD, ranks=2, generated=120, seconds=[2.5])
    job = replace(GOOD, system="paged", job="mixed", batch=None)
    alone, oom = replace(GOOD, batch=16), replace(GOOD, batch=16, ranks=2, outcome="oom", seconds=[])
    kept = folder(tmp_path, two, GOOD, replace(GOOD, ranks=4, generated=480), job, replace(job, ranks=4), alone, oom)
    tables.write(kept, "generated")
    *_, header, _, first, second = (tmp_path / "tables.md").read_text().splitlines()
    assert header == "| system | job | batch | 1 | 2 | 4 |"
    assert first == "| accelerate | seed | 8 | 1.00 | 1.60 | 8.00 |"
    assert second == "| paged | mixed |  | 1.00 |  | 1.00 |"
    one = folder(tmp_path / "one", GOOD)
    assert "number of ranks" not in tables.write(one, "generated").read_text()


def test_two_benches_beside_each_other(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", GOOD, replace(GOOD, batch=16))
    twice = replace(GOOD, seconds=[1.0])
    other = folder(
        tmp_path / "other", twice, replace(GOOD, batch=16, outcome="oom", seconds=[]), replace(GOOD, batch=32)
    )
    lines = tables.compare(one, other, "generated").splitlines()[2:]
    assert [line.split(" | ")[3:] for line in lines] == [["8", "30.0", "60.0", "2.00 |"], ["16", "30.0", "oom", " |"]]


def test_what_is_kept_is_json_for_others(tmp_path: Path) -> None:
    folder(tmp_path, GOOD)
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["seconds"] == [3.0, 1.0, 2.0]
