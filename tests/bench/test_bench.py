"""The whole bench on tiny models: every engine, two ranks, a cell that runs out of memory, and going on."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click import testing

from batchgen.bench import Bench, System, _cells, run
from batchgen.bench.results import BenchError, Folder, Result
from batchgen.bench.worker import Task, Worker
from batchgen.commands import main
from batchgen.engines.echo import Echo
from batchgen.runs.stop import Stop
from batchgen.types import Batch, Prompt
from batchgen.world import World
from tests.commands.starts import until
from tests.engines.runs import OUT_OF_MEMORY, ROOT, altered
from tests.models.test_shapes import TINY

# For sitecustomize: rank 1 finds that it cannot go on, with a sentence for the user, at more than 3 rows.
REFUSES = """
import os
if os.environ.get("RANK") == "1":
    from batchgen.engine import EngineError
    from batchgen.engines.echo import Echo
    generate = Echo.generate
    def refusing(self, prompts, stop):
        prompts = list(prompts)
        if len(prompts) > 3:
            raise EngineError("no more than 3 rows (injected)")
        return generate(self, iter(prompts), stop)
    Echo.generate = refusing
"""


def bench(folder: Path, *words: str, site: str | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{site}:{ROOT}" if site else str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "batchgen", "bench", *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        timeout=280,
    )
    assert done.returncode == code, done.stderr
    return done


def here(folder: Path, *words: str) -> testing.Result:
    """The same in this process: what starts no ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return testing.CliRunner().invoke(main, ["bench", *words])


def cells(folder: Path) -> dict[tuple[str, str, int | None], dict[str, object]]:
    lines = (folder / "bench" / "results.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    found = {(one["system"], one["job"], one["batch"]): one for one in results}
    assert len(found) == len(lines), "a cell was measured twice"
    return found


@pytest.mark.slow
def test_a_cell_that_runs_out_of_memory_is_a_cell_and_the_bench_goes_on(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    site = tmp_path / "site"
    site.mkdir()
    # Rank 1 has no room for more than 3 rows: a batch of 4 is an end for ranks that step together.
    (site / "sitecustomize.py").write_text(OUT_OF_MEMORY)
    words = ["--random-weights", "tiny.json", "--dtype", "float32", "--ranks", "2", "--tokens", "5", "--cycles", "2"]
    first = [*words, "--engines", "accelerate,ds-zero", "--batch-sizes", "1,2,4,8"]
    assert bench(tmp_path, *first, site=str(site)).stdout == "bench/tables.md\n"
    found = cells(tmp_path)
    for system in ("accelerate", "ds-zero"):
        assert [found[system, "seed", batch]["outcome"] for batch in (1, 2)] == ["ok", "ok"]
        assert found[system, "seed", 2]["generated"] == 2 * 2 * 5
        assert len(found[system, "seed", 2]["seconds"]) == 2  # type: ignore[arg-type]
        assert found[system, "seed", 4]["outcome"] == "oom"
        assert (system, "seed", 8) not in found, "the seed leaves larger ones out, too"
    assert found["accelerate", "seed", 4]["fits"] == 2

    # The same again has nothing to do; another system and a job are added, in the same folder.
    paged = "paged:tp=2:step_tokens=4"
    more = ["--engines", f"accelerate,{paged},echo", "--batch-sizes", "1,2,16"]
    done = bench(tmp_path, *words, *more)
    assert "accelerate: batches" not in done.stderr
    found = cells(tmp_path)
    assert found[paged, "seed", 2]["generated"] == 2 * 5, "a group is one stream"
    # A step has no more tokens, and a row in work takes one: not all rows are in work together.
    assert (found[paged, "seed", 16]["outcome"], found[paged, "seed", 16]["rows"]) == ("ok", 16)
    fits = int(str(found[paged, "seed", 16]["fits"]))
    assert 0 < fits < 16
    assert found["echo", "seed", 2]["outcome"] == "ok"
    tables = (tmp_path / "bench" / "tables.md").read_text()
    assert tables.startswith("random weights of tiny.json (")
    assert " bytes of KV cache for a token in 2 layers), float32, 5 new tokens, median of 2 cycles" in tables
    assert "CPU cores, measured: " in tables
    assert "| accelerate | 2 |" in tables
    assert "| oom |" in tables
    assert f"| {paged} | 2 | 16 ({fits} at once) |" in tables
    assert (tmp_path / "bench" / "throughput.png").stat().st_size > 5000
    wrong = here(tmp_path, *words, *more, "--tokens", "6")
    assert wrong.exit_code == 4
    assert "holds another bench: tokens was 5, now 6" in wrong.output
    assert "| echo | 2 | seed | 2 |" in here(tmp_path, "compare", "bench", "bench").output


@pytest.mark.slow
def test_jobs_of_unequal_lengths_and_of_ones_own_prompts(tiny_llama: Path, tmp_path: Path) -> None:
    with (tmp_path / "p.jsonl").open("w") as file:
        for number in range(30):
            file.write(json.dumps({"prompt": "abcdefgh " * (number % 4 + 1), "max_new_tokens": 3 + number % 5}) + "\n")
        file.write('{"prompt": 5}\n')
    words = ["--model", str(tiny_llama), "--batch-sizes", "", "-o", "bench"]
    bench(tmp_path, *words, "--input", "p.jsonl", "--sample", "10", "--cycles", "2")
    (result,) = cells(tmp_path).values()
    assert result["outcome"] == "ok"
    assert 9 <= int(str(result["rows"])) <= 10
    assert len(result["seconds"]) == 2
    wanted = int(str(result["job"]).split(" + ")[1].removesuffix(" tokens"))
    assert int(str(result["generated"])) <= wanted <= 70
    known = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert known["versions"]["torch"]
    # Other jobs are added to the same bench, and both commands are there to be read; one that finds nothing is not.
    bench(tmp_path, *words, "--mixed", "2,5", "--cycles", "2")
    assert [job.split(" rows")[0] for _, job, _ in cells(tmp_path)] == ["p.jsonl, 10", "mixed, 2", "mixed, 5"]
    known = (tmp_path / "bench" / "bench.json").read_text()
    assert here(tmp_path, *words, "--mixed", "5", "--cycles", "2").exit_code == 0
    assert (tmp_path / "bench" / "bench.json").read_text() == known
    tables = (tmp_path / "bench" / "tables.md").read_text()
    assert " --input p.jsonl --sample 10 --cycles 2\n" in tables
    assert " --mixed 2,5 --cycles 2\n" in tables
    # On another machine it does not go on.
    (tmp_path / "bench" / "bench.json").write_text(known.replace(" CPU cores", " cores of another kind"))
    refused = bench(tmp_path, *words, "--mixed", "3", "--cycles", "2", code=4)
    assert "what bench holds was measured on " in refused.stderr
    assert " cores of another kind, and this is " in refused.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--engines", "fast"], "there is no engine"),
        (["--engines", "accelerate:no=1"], "engine accelerate has no setting 'no'"),
        (["--random-weights", "gpt-5"], "there is no shape gpt-5"),
        (["--random-weights", "x", "--model", "y"], "name two models"),
        (["--mixed", "3", "--input", "p"], "name different workloads"),
        (["compare", "a", "b"], "a is not a bench folder"),
        (["--engines", "echo", "-o", "notes"], "notes is a file, not a folder. Choose another folder with -o"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("no bench")
    done = here(tmp_path, *words)
    assert done.exit_code == 4
    assert sentence in done.output
    assert not (tmp_path / "bench" / "results.jsonl").exists()


def test_tokens_are_said_to_be_none_of_a_job(tmp_path: Path) -> None:
    for words, rows in (
        (["--mixed", "3"], "16 to 512 new tokens"),
        (["--input", "none.jsonl"], "as many as it asks for"),
    ):
        sentence = f"batchgen: --tokens is for the article's table alone: each row of the workload has {rows}\n"
        for tokens, expected in (([], 0), (["--tokens", "5"], 1)):
            done = here(tmp_path, "--engines", "echo", "--model", "no-such-folder", *words, *tokens)
            assert done.exit_code == 4
            assert done.output.count(sentence) == expected


def test_the_progress_of_a_job_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = "mixed, 2 rows, 6 + 5 tokens"
    monkeypatch.setattr("batchgen.bench.progress.LINE_SECONDS", 0.01)
    generate = Echo.generate

    def generate_and_wait(self: Echo, prompts: Iterator[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        yield from generate(self, prompts, stop)
        if self.signs.generated_tokens:  # of the job: nothing is generated before
            until(lambda: f"{name}: 5 of 5 tokens generated" in caplog.messages)

    monkeypatch.setattr(Echo, "generate", generate_and_wait)
    rows = {name: [([65, 66, 67], 2), ([68, 69, 70], 3)]}
    task = Task("echo", [], "", "auto", [], 1, 2, rows, str(tmp_path), str(tmp_path), None)
    with caplog.at_level(logging.INFO):
        Worker(task, World()).work()
    ends = [message.partition(" took ")[0] for message in caplog.messages if " took " in message]
    cycles = ("a cycle that is not counted", "cycle 1 of at most 2", "cycle 2 of at most 2")
    assert ends == [f"{name}: {cycle}" for cycle in cycles]


@pytest.mark.slow
def test_what_had_no_room_ends_larger_batches_of_as_many_ranks_and_a_crash_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    words = ["--random-weights", "tiny.json", "--dtype", "float32", "--tokens", "5", "--cycles", "1"]
    bench(tmp_path, *words, "--engines", "accelerate", "--batch-sizes", "")
    kept = Folder(tmp_path / "bench")
    for lost in (Result("echo", 2, "seed", 1, "oom"), Result("echo", 1, "seed", 4, "oom")):
        kept.add(lost)
    kept.add(Result("echo", 1, "seed", 2, "exit code 1"))
    bench(tmp_path, *words, "--engines", "echo", "--batch-sizes", "1,2,4,8")
    found = {(one.ranks, one.batch): one.outcome for one in kept.results()}
    assert found == {(2, 1): "oom", (1, 1): "ok", (1, 2): "ok", (1, 4): "oom"}


def test_rows_that_end_one_after_another_are_no_lack_of_memory(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Handed over as they end, in many pieces.
    monkeypatch.setattr("batchgen.engines.paged.engine._YIELD_SECONDS", 0.0)
    settings, tokens, rows = ["step_tokens=16"], 100, 64
    task = Task(
        "paged", settings, str(tiny_llama), "float32", [rows], tokens, 1, {}, str(tmp_path), str(tmp_path), None
    )
    Worker(task, World()).work()
    (said,) = [json.loads(line) for line in (tmp_path / "rank-0.jsonl").read_text().splitlines() if '"seed"' in line]
    assert said["outcome"] == "ok"
    assert said["rows"] == rows
    assert said["fits"] == 16, "a step has no more tokens, and a row in work takes one"


def test_a_job_keeps_the_cycles_that_all_ranks_have_ended(tmp_path: Path) -> None:
    counts = {"rows": 3, "fits": 3, "generated": 30, "counted_by_seed": 30, "device_bytes": None, "host_bytes": 1}
    lines = [
        {"job": "mixed", "batch": None, "outcome": "ok", "seconds": [4.0, 5.0, 6.0][:n], **counts} for n in (1, 2, 3)
    ]
    found = [[{"load_seconds": 1.0, "streams": 2}, *lines], lines[:2]]
    cells: list[tuple[str, int | None]] = [("mixed", None), ("another", None)]
    done, lost = _cells(System.parse("echo"), 2, cells, found, [-15, -15])
    assert (done.outcome, done.seconds, done.generated) == ("ok", [4.0, 5.0], 60)
    assert (lost.job, lost.outcome) == ("another", "exit code -15")


def test_a_rank_that_had_no_memory_has_said_so_before_another_one_dies_of_it() -> None:
    # The starter ends rank 1, which says goodbye slowly, since rank 0 has missed it first.
    found: list[list[dict[str, object]]] = [
        [{"load_seconds": 1.0, "streams": 2}],
        [{"load_seconds": 1.0, "streams": 2}, {"job": "seed", "batch": 4, "outcome": "oom", "fits": 0}],
    ]
    (cell,) = _cells(System.parse("ds-zero"), 2, [("seed", 4), ("seed", 8)], found, [1, -15])
    assert (cell.batch, cell.outcome) == (4, "oom")


@pytest.mark.parametrize(("said", "fits"), [((3, None, 2, None), 2), ((None, 0, None, 4), 0), ((None,) * 4, None)])
def test_ranks_that_do_not_know_how_many_rows_fit_have_no_say_in_it(
    said: tuple[int | None, ...], fits: int | None
) -> None:
    found = [[{"job": "seed", "batch": 8, "outcome": "oom", "fits": rows}] for rows in said]
    (cell,) = _cells(System.parse("paged"), 4, [("seed", 8)], found, [0] * 4)
    assert (cell.outcome, cell.fits) == ("oom", fits)


def test_what_was_measured_before_a_rank_refused_to_go_on_is_kept_and_nothing_else(
    tiny_llama: Path, tmp_path: Path
) -> None:
    kept = Folder(tmp_path / "bench")
    kept.check_or_create({})
    asked = Bench([System.parse("echo")], str(tiny_llama), "float32", [1, 2, 4, 8], 5, 1, ranks=2, command="this")
    with pytest.raises(BenchError, match="echo cannot run here"):
        run(asked, kept, os.environ | altered(tmp_path, REFUSES), Stop())
    assert [(one.batch, one.outcome, one.rows) for one in kept.results()] == [(1, "ok", 2), (2, "ok", 4)]
    assert kept.read_manifest()["commands"] == ["this"]


@pytest.mark.parametrize(
    ("codes", "named"),
    [
        ([1, -11], -11),  # a rank that misses another ends with 1
        ([-6, 1], -6),
        ([0, -6], -6),
        ([-15, -11, 1], -11),
        ([1, 70, -15], 70),
        ([-15, 1], 1),
        ([0, 1], 1),
        ([0, -15], -15),
        ([0, 0], 0),
    ],
)
def test_a_cell_that_is_lost_names_the_rank_that_the_others_died_of(codes: list[int], named: int) -> None:
    (cell,) = _cells(System.parse("ds-zero"), len(codes), [("seed", 4)], [[] for _ in codes], codes)
    assert cell.outcome == f"exit code {named}"
