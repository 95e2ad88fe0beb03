"""`batchgen.run`: the command in one call, from Python."""

from __future__ import annotations

import gc
import io
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import batchgen
from batchgen import Host, Recipe, RunSettings, SamplingParams, Status, run
from batchgen.checkpoint import CheckpointError, RunFolder
from batchgen.engine import Setup
from batchgen.engines.ds_zero.swap import SwapFolder
from batchgen.engines.echo import Echo
from batchgen.formats import InputError
from batchgen.models import tokenizer
from batchgen.runs.flow import MergeError, default_folder
from batchgen.runs.prepare import RunError
from batchgen.runs.progress import watch
from batchgen.types import Batch, Shard
from tests.commands.starts import ENVIRONMENT, prompts, read_rows, write_rows

ALONE = Host(ENVIRONMENT)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return str(write_rows(tmp_path / "prompts.jsonl", prompts(20)))


def texts(status: Status) -> list[str]:
    return [row["text"] for row in read_rows(status.folder / "generations.jsonl")]


def test_one_call_runs_everything_and_gives_the_status(tmp_path: Path, rows: str) -> None:
    recipe = Recipe(sampling=SamplingParams(max_new_tokens=2))
    status = run(rows, tmp_path / "out", RunSettings(recipe=recipe, engine="echo"), host=ALONE)
    assert (status.folder, status.state) == (tmp_path / "out", "finished")
    assert (status.rows, status.good, status.failed, status.open, status.exit_code) == (20, 20, 0, 0, 0)
    assert texts(status) == [str(row["prompt"])[:2] for row in prompts(20)]


def test_a_vocabulary_is_read_once(
    tmp_path: Path, rows: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = tokenizer.read_tokenizer

    def count(model: str) -> Any:
        read.append(model)
        return real(model)

    monkeypatch.setattr(tokenizer, "read_tokenizer", count)
    recipe = Recipe(sampling=SamplingParams(max_new_tokens=2))
    settings = RunSettings(recipe=recipe, engine="paged", model=str(tiny_llama), dtype="float32")
    assert run(rows, tmp_path / "out", settings, host=ALONE).good == 20
    assert read == [str(tiny_llama)]


def test_garbage_is_looked_for_among_objects_of_the_run(
    tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart: list[int] = []
    real = Echo.generate

    def count(*arguments: Any) -> Iterator[Batch]:
        apart.append(gc.get_freeze_count())
        return real(*arguments)

    monkeypatch.setattr(Echo, "generate", count)
    assert run(rows, tmp_path / "out", RunSettings(engine="echo"), host=ALONE).good == 20
    assert (apart[0] > 0, gc.get_freeze_count()) == (True, 0)
    gc.freeze()  # somebody else does
    try:
        assert run(rows, tmp_path / "other", RunSettings(engine="echo"), host=ALONE).good == 20
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_two_runs_in_one_process_leave_the_process_as_it_was(tmp_path: Path, rows: str) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
    level = logging.getLogger("batchgen").level
    for name in ("a", "b", "a"):
        assert run(rows, tmp_path / name, RunSettings(engine="echo"), host=ALONE).good == 20
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)] == before
    assert logging.getLogger("batchgen").level == level
    assert not [thread.name for thread in threading.enumerate() if thread.name in ("heartbeat", "progress")]


def test_run_works_in_a_thread(tmp_path: Path, rows: str) -> None:
    found: list[Status] = []
    thread = threading.Thread(
        target=lambda: found.append(run(rows, tmp_path / "out", RunSettings(engine="echo"), host=ALONE))
    )
    thread.start()
    thread.join()
    assert found[0].good == 20


def test_signal_stops_a_run_and_the_caller_goes_on(tmp_path: Path, rows: str) -> None:
    @contextmanager
    def interrupt(*_: object) -> Iterator[None]:
        signal.raise_signal(signal.SIGTERM)
        yield

    stopped = run(rows, tmp_path / "out", RunSettings(engine="echo"), host=Host(ENVIRONMENT, watch=interrupt))
    assert (stopped.exit_code, stopped.attempts[0].ended) == (75, "stopped by SIGTERM")
    assert stopped.open == 20
    assert not (tmp_path / "out/generations.jsonl").exists()
    assert texts(run(rows, tmp_path / "out", RunSettings(engine="echo"), host=ALONE)) == [
        row["prompt"] for row in prompts(20)
    ]


def test_progress_is_shown_to_whoever_asks(tmp_path: Path, rows: str) -> None:
    stream = io.StringIO()
    host = Host(ENVIRONMENT, watch=lambda attempt, done: watch(attempt, done, stream))
    run(rows, tmp_path / "out", RunSettings(engine="echo"), host=host)
    assert stream.getvalue().startswith("20/20 rows, ")


def test_ranks_can_be_started_from_python(tmp_path: Path, rows: str) -> None:
    command = ["run", rows, "-o", str(tmp_path / "out"), "--engine", "echo"]
    host = Host(ENVIRONMENT, ranks=2, rank_command=command)
    assert run(rows, tmp_path / "out", RunSettings(engine="echo"), host=host).good == 20
    assert len(list((tmp_path / "out").glob("generations-*"))) == 2


@pytest.mark.parametrize("ranks", [0, 2])
def test_ranks_without_a_command_are_refused(ranks: int) -> None:
    with pytest.raises(ValueError, match="rank_command"):
        Host(ranks=ranks)


def test_what_cannot_run_raises_a_sentence(tmp_path: Path, rows: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"there is no file missing\.jsonl"):
        run("missing.jsonl", out, RunSettings(engine="echo"), host=ALONE)
    with pytest.raises(InputError, match="there is no input"):
        run([], out, RunSettings(engine="echo"), host=ALONE)
    with pytest.raises(RunError, match="there is no dtype 'float7'"):
        run(rows, out, RunSettings(engine="echo", dtype="float7"), host=ALONE)
    with pytest.raises(RunError, match="the batch size must be 1 or more"):
        run(rows, out, RunSettings(engine="echo", batch_size=0), host=ALONE)
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        run(rows, Path(rows), RunSettings(engine="echo"), host=ALONE)
    assert not (out / "run.json").exists()


def test_output_that_cannot_be_merged_says_so_and_the_next_start_merges(tmp_path: Path, rows: str) -> None:
    out = tmp_path / "out"
    (out / "generations.jsonl").mkdir(parents=True)
    with pytest.raises(MergeError, match=r"cannot write .*generations\.jsonl.*: Is a directory"):
        run(rows, out, RunSettings(engine="echo"), host=ALONE)
    (out / "generations.jsonl").rmdir()
    status = run(rows, out, RunSettings(engine="echo"), host=ALONE)
    assert texts(status) == [row["prompt"] for row in prompts(20)]
    assert "MergeError" in str(status.attempts[0].ended)


def test_merge_writes_another_format_of_a_finished_run(tmp_path: Path, rows: str) -> None:
    status = run(rows, tmp_path / "out", RunSettings(engine="echo"), host=ALONE)
    path = batchgen.merge(RunFolder(status.folder), None, "arrow")
    assert path == tmp_path / "out/generations.arrow"
    assert path.read_bytes().startswith(b"ARROW1")


@pytest.mark.parametrize(
    ("inputs", "folder"),
    [
        (["data/prompts.jsonl.gz"], "prompts"),
        (["data/part-*.parquet", "more.jsonl"], "part"),
        (["*.jsonl"], "out"),
        (["[ab]?.jsonl"], "ab"),
        ([".hidden.jsonl"], "hidden"),
        (["saved"], "saved-out"),
        (["elsewhere/saved/"], "saved"),
        ([], "out"),
    ],
)
def test_default_folder_is_named_after_the_first_input(inputs: list[str], folder: str) -> None:
    assert default_folder(inputs) == Path(folder)


def test_exported_names_are_there_and_importing_the_package_is_light() -> None:
    program = (
        "import sys, batchgen\n"
        "assert 'batchgen.runs.flow' not in sys.modules\n"
        "assert sorted(batchgen._HOMES) == sorted(batchgen.__all__)\n"
        "print([name for name in batchgen.__all__ if not hasattr(batchgen, name)])\n"
        "print('torch' in sys.modules, hasattr(batchgen, 'nothing'))\n"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\nFalse False\n"


def test_shards_do_the_run_together_and_the_last_one_merges(tmp_path: Path, rows: str) -> None:
    out = tmp_path / "out"
    for index in (2, 0, 1):
        assert not (out / "generations.jsonl").exists()
        part = run(rows, out, RunSettings(engine="echo"), host=Host(ENVIRONMENT, shard=Shard(index, 3)))
        assert (part.rows, part.good, part.open, part.exit_code) == (len(range(index, 20, 3)),) * 2 + (0, 0)
    assert [row["index"] for row in read_rows(out / "generations.jsonl")] == list(range(20))
    # A shard that is done costs nothing, and the whole run has nothing left to do.
    assert run(rows, out, RunSettings(engine="echo"), host=Host(ENVIRONMENT, shard=Shard(1, 3))).exit_code == 0
    whole = run(rows, out, RunSettings(engine="echo"), host=ALONE)
    assert (whole.rows, whole.good, whole.state) == (20, 20, "finished")


def test_shards_on_one_host_keep_what_waits_on_its_disk_apart(
    tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, setups, made = tmp_path / "out", [], Echo.__init__

    def recording(self: Echo, setup: Setup, options: Echo.Options) -> None:
        setups.append(setup)
        made(self, setup, options)

    monkeypatch.setattr(Echo, "__init__", recording)
    for shard in (Shard(0, 2), Shard(1, 2)):
        run(rows, out, RunSettings(engine="echo"), host=Host(ENVIRONMENT, shard=shard))
    run(rows, tmp_path / "whole", RunSettings(engine="echo"), host=ALONE)
    folders = [SwapFolder(tmp_path, setup.run, 0) for setup in setups]
    assert len({folder.path for folder in folders}) == 3
    folders[0].open()
    folders[1].clean(patience=0)
    folders[1].open()
    for folder in folders[:2]:
        folder.close()


def test_the_ranks_of_a_shard_do_its_rows_alone(tmp_path: Path, rows: str) -> None:
    out = tmp_path / "out"
    command = ("run", rows, "-o", str(out), "--engine", "echo", "--shard", "1/3")
    host = Host(ENVIRONMENT, ranks=2, rank_command=command, shard=Shard(1, 3))
    part = run(rows, out, RunSettings(engine="echo"), host=host)
    assert (part.good, part.open) == (7, 0)
    assert run(rows, out, RunSettings(engine="echo"), host=ALONE).good == 20
    assert sum(path.read_text().count("\n") for path in out.glob("generations-0000[12]-*.jsonl")) == 20
