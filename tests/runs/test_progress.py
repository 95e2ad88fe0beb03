"""What a person sees of a run under way: on a terminal, in a log, and when nobody looks."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchgen.checkpoint import Attempt, Done, RunFolder, claim
from batchgen.runs import progress
from batchgen.runs.progress import duration, watch
from batchgen.world import World
from tests.commands.starts import Started, batchgen, prompts, slow_echo, write_rows


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    folder = RunFolder(tmp_path / "out")
    folder.make()
    return claim(folder, World(), {}, 5.0)


def beat(attempt: Attempt, rank: int = 0, **counts: object) -> None:
    zeros = {"state": "running", "rows": 0, "failed": 0, "committed_tokens": 0, "generated_tokens": 0, "ready": None}
    path = attempt.folder.attempts / f"{attempt.number:05d}-{rank:05d}.json"
    path.write_text(json.dumps({**zeros, **counts}))


def shown(attempt: Attempt, done: Done, stream: io.StringIO | None = None) -> str:
    stream = stream or io.StringIO()
    with watch(attempt, done, stream):
        pass
    return stream.getvalue()


class Terminal(io.StringIO):
    """A stream that is one."""

    def isatty(self) -> bool:
        return True


def test_before_the_first_rank_is_ready_it_says_that_the_model_loads(attempt: Attempt) -> None:
    assert re.fullmatch(r"loading the model, \d s\n", shown(attempt, Done(bytearray(100))))
    beat(attempt, state="loading")
    assert shown(attempt, Done(bytearray(100))).startswith("loading the model")


def test_line_counts_the_rows_of_all_ranks_and_of_earlier_attempts(attempt: Attempt) -> None:
    done = Done(bytearray([2] * 10 + [0] * 90))
    beat(attempt, 0, rows=20, failed=1, ready=time.time() - 10, committed_tokens=2000, generated_tokens=2000)
    beat(attempt, 1, rows=22, failed=2, ready=time.time() - 10, committed_tokens=1900, generated_tokens=2000)
    text = shown(attempt, done)
    assert text.startswith("52/100 rows, ")
    rate = float(re.search(r"([\d,.]+) tokens/s", text)[1].replace(",", ""))  # type: ignore[index]
    assert 300 < rate <= 400
    assert ", 3 failed, " in text


def test_time_left_follows_from_tokens_a_row_and_what_is_in_flight(attempt: Attempt) -> None:
    # 100 tokens a row; 80 rows are open, of which 1000 tokens are generated; 300 tokens a second.
    beat(attempt, rows=20, ready=time.time() - 10, committed_tokens=2000, generated_tokens=3000)
    left = re.search(r", (\d+) s left\n", shown(attempt, Done(bytearray(100))))
    assert left is not None
    assert 23 <= int(left[1]) <= 30


def test_time_left_of_a_resumed_run_is_known_before_its_first_batch(attempt: Attempt) -> None:
    done = Done(bytearray([2] * 50 + [0] * 50), generated_tokens=5000)
    beat(attempt, ready=time.time() - 1, generated_tokens=100)
    assert " left" in shown(attempt, done)
    assert " left" not in shown(attempt, Done(bytearray(100)))


def test_terminal_has_a_bar_in_one_line_as_wide_as_it(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    beat(attempt, rows=50, ready=time.time() - 10, committed_tokens=500, generated_tokens=500)
    text = shown(attempt, Done(bytearray(100)), Terminal())
    assert text.startswith("\r[##########..........] 50/100 rows, ")
    assert len(text) == len("\r") + 59 + len("\n")


def test_lines_come_again_and_again(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    stream = io.StringIO()
    with watch(attempt, Done(bytearray(1)), stream):
        deadline = time.monotonic() + 30
        while stream.getvalue().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert stream.getvalue().count("\n") >= 4


class Gone(io.StringIO):
    """A pipe that nobody reads any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_stream_that_is_gone_ends_the_showing_and_not_the_run(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.001)
    with watch(attempt, Done(bytearray(1)), Gone()):
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (360000, "100 h 00 min"),
    ],
)
def test_duration_is_for_a_person(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_run_on_a_terminal_draws_a_bar_there_and_keeps_stdout_clean(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", prompts(100))
    master, slave = pty.openpty()
    with Started(batchgen(*slow_echo(rows)), tmp_path, before=dup_to_stderr(slave)) as process:
        os.close(slave)
        drawn = read_terminal(master)
        ended = process.end()
    os.close(master)
    assert (ended.code, ended.out) == (0, "p/generations.jsonl\n")
    assert re.search(r"\r\[#+\.+\] \d+/100 rows, [\d,]+ tokens/s, \d s left", drawn)
    assert "\r[####################] 100/100 rows, " in drawn
    assert drawn.endswith("batchgen: finished; 100 of 100 rows good, 0 failed, 0 open\r\n")


def dup_to_stderr(descriptor: int) -> Callable[[], Any]:
    return lambda: os.dup2(descriptor, 2)


def read_terminal(master: int) -> str:
    data = b""
    while True:
        try:
            data += os.read(master, 65536)
        except OSError:  # EIO: the last writer is gone
            return data.decode()
