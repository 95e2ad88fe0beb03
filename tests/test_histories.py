"""Random histories of runs end as if nothing had happened; and whoever judges them sees what is wrong with one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchgen import run
from tests.histories import KINDS, Start, await_end, check_exit, draw, live
from tests.processes import marked, send
from tests.uneven_rows import Fault, Known, Rows, check, known_prompts, save_models, write_rows

Line = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, list[Known]]]:
    """Each with prompts for it."""
    return [(model, known_prompts(model)) for model in save_models(tmp_path_factory.mktemp("models"))]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "kind"), [(803, "stop two"), (14, "kill one"), (31, "freeze one")])
def test_a_disturbed_run_loses_and_repeats_nothing(
    seed: int, kind: str, models: list[tuple[Path, list[Known]]], tmp_path: Path
) -> None:
    # At the first sign of work: this machine may be fast enough to be done before the moment that was drawn.
    starts = [replace(start, moment=0.0) for start in draw(seed)]
    history = live(seed, tmp_path, *models[seed % len(models)], starts=starts)
    assert kind in [end.start.kind for end in history.ends if end.struck and end.code == 75], "it came too late"


def test_all_kinds_are_drawn_and_each_history_ends_undisturbed() -> None:
    drawn = [draw(seed) for seed in range(1, 31)]
    assert {start.kind for starts in drawn for start in starts} == {*KINDS, "none"}
    assert all([start.kind for start in starts].index("none") == len(starts) - 1 for starts in drawn)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """A run that is as it shall be, and its rows."""
    folder = tmp_path_factory.mktemp("finished")
    known = [Known(f"prompt {number}", ["?"] * 40, 40) for number in range(20)]
    rows = write_rows(folder / "prompts.jsonl", 8, known)
    assert 0 < len(rows.errors) < rows.count
    run(str(rows.path), folder / "out", engine="echo", batch_size=3)
    return folder / "out", rows


def edit(path: Path, change: Callable[[list[Line]], object]) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def first_good(lines: list[Line]) -> Line:
    return next(line for line in lines if line["error"] is None)


def first_bad(lines: list[Line]) -> Line:
    return next(line for line in lines if line["error"] is not None)


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("lost", "generations.jsonl", lambda lines: lines.pop(3)),
        ("doubled", "generations.jsonl", lambda lines: lines.insert(4, lines[3])),
        ("order", "generations.jsonl", lambda lines: lines.reverse()),
        ("text", "generations.jsonl", lambda lines: first_good(lines).update(text="another")),
        ("text", "generations.jsonl", lambda lines: first_good(lines).update(generated_tokens=77)),
        ("errors", "generations.jsonl", lambda lines: first_bad(lines)["error"].update(line=99)),
        ("errors", "generations.jsonl", lambda lines: first_good(lines).update(error={"line": 1, "type": "x"})),
        ("errors", "errors.jsonl", lambda lines: lines.pop()),
        ("timing", "timing.jsonl", lambda lines: lines.append(lines[-1])),
        ("lost", "batches-00001-00000.jsonl", lambda lines: lines.pop(0)),
        ("doubled", "batches-00001-00000.jsonl", lambda lines: lines.append(lines[0])),
    ],
)
def test_a_doctored_run_is_seen_through(
    kind: str, name: str, change: Callable[[list[Line]], object], finished: tuple[Path, Rows], tmp_path: Path
) -> None:
    out, rows = finished
    check(out, out, rows)
    shutil.copytree(out, tmp_path / "doctored")
    edit(tmp_path / "doctored" / name, change)
    with pytest.raises(Fault) as seen:
        check(tmp_path / "doctored", out, rows)
    assert seen.value.kind == kind


def test_a_row_that_runs_past_its_stop_text_is_seen(finished: tuple[Path, Rows], tmp_path: Path) -> None:
    out, rows = finished
    shutil.copytree(out, tmp_path / "doctored")
    edit(tmp_path / "doctored" / "generations.jsonl", lambda lines: first_good(lines).update(finish_reason="length"))
    index = next(row for row in range(rows.count) if row not in rows.errors)
    with pytest.raises(Fault, match="did not end at its stop text"):
        check(tmp_path / "doctored", tmp_path / "doctored", replace(rows, stops=frozenset({index})))


def test_a_start_that_hangs_or_leaves_a_process_behind_is_a_fault() -> None:
    mark = f"BATCHGEN_HISTORY=test-{os.getpid()}"
    environment = {**os.environ, **dict([mark.split("=")])}
    sleeper = "import time; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{sleeper}'])"
    for program in (sleeper, parent):
        starter = subprocess.Popen([sys.executable, "-c", program], env=environment)
        with pytest.raises(Fault, match="hung: 1 processes are left"):
            await_end(starter, mark, 2.0)
        for process in marked(mark):
            assert send(process, signal.SIGKILL, mark)
        await_end(starter, mark, 20.0)


@pytest.mark.parametrize(
    ("start", "code", "fine"),
    [
        (Start(2, 1, 0.1, kind="kill one", victims=(1,), signals=(signal.SIGKILL,)), 75, False),
        (Start(2, 1, 0.1, kind="kill one", victims=(1,), signals=(signal.SIGKILL,)), -9, False),
        (Start(1, 1, 0.1, kind="kill one", victims=(0,), signals=(signal.SIGKILL,)), -9, True),
        (Start(2, 1, 0.1, kind="kill all", signals=(signal.SIGKILL,)), -9, True),
        (Start(2, 1, 0.1, kind="stop all", signals=(signal.SIGTERM,)), -15, True),  # this run has ended: nobody answers
        (Start(2, 1, 0.1, kind="stop all", signals=(signal.SIGTERM,)), 4, False),
        (Start(2, 1, 0.1), 3, True),
        (Start(2, 1, 0.1), 0, False),
    ],
)
def test_exit_codes_that_may_be_after_a_finished_run(
    start: Start, code: int, fine: bool, finished: tuple[Path, Rows]
) -> None:
    out, rows = finished
    if fine:
        check_exit(start, code, out, 1, rows)
    else:
        with pytest.raises(Fault, match=f"exit code {code}"):
            check_exit(start, code, out, 1, rows)
