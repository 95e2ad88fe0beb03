"""ZeRO streams on CPU ranks: the text of one process, whatever the ranks have to do; nobody hangs, nothing is lost."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from batchgen.engine import EngineError
from batchgen.engines import find, parse_options
from tests.engines import engine_rank
from tests.engines.ds_zero import zero_matrix
from tests.engines.runs import (
    OUT_OF_MEMORY,
    ROOT,
    altered,
    command,
    ended_by,
    process_of_rank_1,
    rows,
    run,
    texts,
    texts_alone,
)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the reads past the page cache are compiled once on a machine
@pytest.mark.parametrize("case", zero_matrix.COVERING, ids=lambda case: "-".join(map(str, case)))
def test_every_stream_gets_the_text_of_one_process(case: zero_matrix.Case, tmp_path: Path) -> None:
    # A step of these takes long; `python -m tests.engines.ds_zero.zero_matrix` gives all sets, and runs all cases.
    sets = (7,) if case.name == "smollm2" else (1, 7) if case.place == "nvme" else engine_rank.SETS
    model = zero_matrix.model(case.name, tmp_path, wide=case.place == "nvme")
    zero_matrix.compare(case, model, tmp_path, sets)


@pytest.mark.slow
def test_error_rows_and_an_idle_rank_hang_nobody(tiny_llama: Path, tmp_path: Path) -> None:
    # Rank 1 of 2 has the odd rows: all of them are bad, and it only keeps the other company.
    prompts = rows(tmp_path / "p.jsonl", 8, bad=(1, 3, 5, 7))
    done = run(*command(prompts, tmp_path / "zero", tiny_llama, "--ranks", "2"))
    assert done.returncode == 3, done.stderr
    assert texts(tmp_path / "zero") == texts_alone(prompts, tiny_llama, tmp_path / "one")


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(tiny_llama: Path, tmp_path: Path) -> None:
    prompts, out = rows(tmp_path / "p.jsonl", 60), tmp_path / "zero"
    words = command(prompts, out, tiny_llama, "--batch-size", "2", "--heartbeat-seconds", "0.1")
    assert "rank 1 died" in ended_by(signal.SIGKILL, [*words, "--ranks", "2"], out)
    assert run(*words, "--ranks", "3").returncode == 0
    assert texts(out) == texts_alone(prompts, tiny_llama, tmp_path / "one")


@pytest.mark.slow
def test_a_stop_that_reaches_one_rank_alone_ends_all_at_the_same_step(tiny_llama: Path, tmp_path: Path) -> None:
    prompts, out = rows(tmp_path / "p.jsonl", 200), tmp_path / "zero"
    words = command(prompts, out, tiny_llama, "--batch-size", "2", "--heartbeat-seconds", "0.1", "--ranks", "2")
    ended_by(signal.SIGUSR2, words, out)
    ends = [json.loads(path.read_bytes()) for path in sorted(out.glob("attempts/00001-*.json"))]
    assert ends[0]["steps"] == ends[1]["steps"]
    assert {end["state"] for end in ends} <= {"stopped", "finished"}


@pytest.fixture(scope="module")
def wide_bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its matrices are large enough to be swapped, the tied embedding among them."""
    return zero_matrix.model("bloom", tmp_path_factory.mktemp("models"), wide=True)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the reads past the page cache are compiled once on a machine
def test_nvme_keeps_its_files_to_itself_and_cleans_up_after_a_crash(wide_bloom: Path, tmp_path: Path) -> None:
    prompts, out, disk = rows(tmp_path / "p.jsonl", 2), tmp_path / "zero", tmp_path / "disk"
    disk.mkdir()
    others = disk / "batchgen-another"
    others.mkdir()
    words = command(prompts, out, wide_bloom, "--batch-size", "2", "--heartbeat-seconds", "0.1", "--ranks", "2")
    words += ["--set", f"offload=nvme={disk}"]
    with (tmp_path / "log").open("w") as log:
        starter = subprocess.Popen(words, stderr=log, stdout=log, text=True, cwd=ROOT)
    process_of_rank_1(out, starter, 3)
    starter.kill()
    starter.wait()
    assert len(list(disk.rglob("*.swp"))) > 2  # what the killed ranks have left
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert "the weights come at" in done.stderr
    assert list(disk.iterdir()) == [others]
    assert texts(out) == texts_alone(prompts, wide_bloom, tmp_path / "one")
    timing = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    assert all(batch["share_of_bound"] > 0 for batch in timing)


@pytest.mark.slow
def test_weights_of_8_bits_run_and_change_the_text(tiny_llama: Path, tmp_path: Path) -> None:
    prompts = rows(tmp_path / "p.jsonl", 12)
    eight = ["--ranks", "2", "--set", "weight_bits=8", "--set", "weight_group=16"]
    done = run(*command(prompts, tmp_path / "eight", tiny_llama, *eight))
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path / "eight") != texts_alone(prompts, tiny_llama, tmp_path / "one")


@pytest.mark.slow
def test_out_of_memory_inside_a_shared_step_starts_the_ranks_again_smaller(tiny_llama: Path, tmp_path: Path) -> None:
    prompts, out = rows(tmp_path / "p.jsonl", 24), tmp_path / "zero"
    words = command(prompts, out, tiny_llama, "--batch-size", "6", "--ranks", "2")
    done = run(*words, environment=altered(tmp_path, OUT_OF_MEMORY))
    assert done.returncode == 0, done.stderr
    assert "starting the ranks again, with smaller batches" in done.stderr
    # From 6 rows to 3; a limit is for a number of tokens, so that shorter prompts may try more rows once more.
    assert 2 <= len(list(out.glob("attempts/?????.json"))) <= 4
    assert texts(out) == texts_alone(prompts, tiny_llama, tmp_path / "one")


def test_settings_that_cannot_be_are_sentences() -> None:
    kind = find("ds-zero")
    for offload in ("disk", "nvme", "cpu=x"):
        with pytest.raises(EngineError, match=r"must be cpu, or nvme=FOLDER"):
            parse_options(kind, [f"offload={offload}"])
