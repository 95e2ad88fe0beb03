"""Runs under faults end as if nothing had happened; planted faults and doctored results are seen through."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchgen import RunSettings, run
from tests.chaos.__main__ import main
from tests.chaos.checker import Fault, check, check_survived
from tests.chaos.draw import CUT_POWER, ENGINES, KINDS, SECOND_START, Harm, Start, deal, draw, engine_of
from tests.chaos.history import Ground, live
from tests.chaos.plants import PLANTS, plant
from tests.chaos.rows import Known, Rows, write_rows
from tests.chaos.starts import Place, await_end, check_exit
from tests.processes import marked, send

Line = dict[str, Any]

FINAL = Start("echo", 1, 5, 1.0)
SEED = 9  # of a prompt file that is not packed


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("chaos"))


@pytest.mark.parametrize("seed", [4, 29])
def test_a_run_under_faults_loses_and_doubles_nothing(seed: int, ground: Ground, tmp_path: Path) -> None:
    history = live(seed, "echo", tmp_path, ground)
    assert history.faults, "nothing struck; choose another seed"


def test_rows_are_appended_to_a_run_that_is_struck(ground: Ground, tmp_path: Path) -> None:
    struck = Start("echo", 2, 3, 0.1, ("seconds=0.01",), "kill all", moment=0.4, signals=(signal.SIGKILL,))
    history = live(SEED, "echo", tmp_path, ground, [struck, Harm("append rows", 3), struck, FINAL])
    assert "append rows" in history.faults
    assert [step for step in history.steps if step.startswith("append rows: ")] != ["append rows: 0"]


@pytest.mark.slow
def test_every_kind_of_fault_is_drawn_three_times_and_the_log_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():  # so that continuous integration keeps what was drawn, and what has struck
        assert main(["--each", "3", "--seed", "1"]) == 0


def frozen(victim: int) -> Start:
    start = Start("ds-zero", 2, 2, 0.1, ("timeout_seconds=4",), "freeze one")
    return replace(start, victims=(victim,), signals=(signal.SIGSTOP,))


# By engine: what must have struck. The moments are the first sign of work: this machine may be fast enough to be done
# before the one that was drawn.
WITH_MODELS: dict[str, tuple[str, list[Start | Harm]]] = {
    "stop": (
        "ds-zero",
        [Start("ds-zero", 3, 3, 0.1, kind="stop two", victims=(2, 0), signals=(signal.SIGTERM, signal.SIGUSR2))],
    ),
    "freeze": ("ds-zero", [frozen(1), frozen(0), frozen(1)]),
    "kill": (
        "ds-inference",
        [Start("ds-inference", 2, 2, 0.1, ("tp=2",), "kill one", victims=(1,), signals=(signal.SIGKILL,))],
    ),
    "power": ("accelerate", [Start("accelerate", 2, 2, 0.1, kind=CUT_POWER, operation=42), Harm("tear tail", 3)]),
    "kill all": (
        "paged",
        [Start("paged", 2, 2, 0.1, kind="kill all", signals=(signal.SIGKILL,)), Harm("delete file", 5)],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_MODELS)
def test_engines_with_models_lose_and_double_nothing(name: str, ground: Ground, tmp_path: Path) -> None:
    engine, steps = WITH_MODELS[name]
    history = live(1, engine, tmp_path, ground, [*steps, Start(engine, 1, 8, 1.0)])
    assert history.ends[0].struck, "it came too late"
    assert history.ends[0].code in (75, -signal.SIGKILL)


def cut(operation: int, moment: float = 0.5) -> list[Start | Harm]:
    """A run whose power goes at that operation on files, and one that ends it."""
    return [Start("echo", 1, 3, 1.0, kind=CUT_POWER, operation=operation, moment=moment), FINAL]


# Of a first start: its first batch is written at 43, its record at 45; the second batch at 47 and 49.
COMMITS = range(43, 51)


def test_the_power_may_go_at_any_operation_of_a_commit(ground: Ground, tmp_path: Path) -> None:
    struck = []
    for operation in COMMITS:
        place = tmp_path / str(operation)
        place.mkdir()
        history = live(SEED, "echo", place, ground, cut(operation, operation / 50))
        struck.append(history.ends[0].how)
    assert [how.split()[1] for how in struck] == ["write", "fsync"] * 4
    assert [how.split()[3].partition("-")[0] for how in struck] == ["generations"] * 2 + ["batches"] * 2 + [
        "generations"
    ] * 2 + ["batches"] * 2


@pytest.mark.parametrize(
    ("name", "steps", "kinds"),
    [
        ("record-first", cut(45), "lost"),
        ("text-not-synced", cut(47, 0.7), "lost"),
        ("names-not-synced", cut(44, 0.3), "exit lost"),
        ("trust-tail", cut(49), "lost"),
        (
            "checksum-ignored",
            [replace(FINAL, batch_size=3), Harm("flip bytes", 19), FINAL],
            "torn lost text",
        ),  # by the byte
        ("claim-ignored", [Start("echo", 1, 3, 1.0, ("seconds=0.03",), SECOND_START), FINAL], "exit"),
        ("input-not-compared", [FINAL, Harm("change input", 1), FINAL], "exit"),
    ],
)
def test_a_planted_fault_is_found(
    name: str, steps: Sequence[Start | Harm], kinds: str, ground: Ground, tmp_path: Path
) -> None:
    assert name in PLANTS
    with pytest.raises(Fault) as seen:
        live(SEED, "echo", tmp_path, ground, steps, plant(name, tmp_path / "planted"))
    assert seen.value.kind in kinds.split()


def test_all_kinds_and_engines_are_drawn_and_each_history_ends_undisturbed() -> None:
    assert {engine_of(seed) for seed in range(1, 201)} == set(ENGINES)
    drawn = [draw(seed, engine) for seed in range(1, 61) for engine in ("echo", "ds-zero")]
    assert {step.kind for steps in drawn for step in steps} == {*KINDS, "none"}
    assert all([step.kind for step in steps].index("none") == len(steps) - 1 for steps in drawn)


def test_the_short_form_and_the_engines_with_models_have_every_kind_three_times() -> None:
    dealt = deal(1, 3)
    assert {steps[-1].kind for steps in dealt} == {"none"}
    times = Counter(step.kind for steps in (*dealt, *(steps for _, steps in WITH_MODELS.values())) for step in steps)
    assert {kind: times[kind] for kind in KINDS if times[kind] < 3} == {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """A run that is as it shall be, and its rows."""
    folder = tmp_path_factory.mktemp("finished")
    known = [Known(f"prompt {number}", ["?"] * 40, 40) for number in range(20)]
    rows = write_rows(folder / "prompts.jsonl", 8, known)
    assert 0 < len(rows.errors) < rows.count
    run(str(rows.path), folder / "out", RunSettings(engine="echo", batch_size=3))
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
    ],
)
def test_a_doctored_output_is_seen_through(
    kind: str, name: str, change: Callable[[list[Line]], object], finished: tuple[Path, Rows], tmp_path: Path
) -> None:
    out, rows = finished
    check(out, out, rows)
    shutil.copytree(out, tmp_path / "doctored")
    edit(tmp_path / "doctored" / name, change)
    with pytest.raises(Fault) as seen:
        check(tmp_path / "doctored", out, rows)
    assert seen.value.kind == kind


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("lost", "batches-00001-00000.jsonl", lambda content: content.partition(b"\n")[2]),
        ("doubled", "batches-00001-00000.jsonl", lambda content: content + content.partition(b"\n")[0] + b"\n"),
        ("lost", "batches-00001-00000.jsonl", lambda content: content.replace(b'"rows":[', b'"rows":[ ', 1)),
        ("lost", "generations-00001-00000.jsonl", lambda content: content.replace(b'"index":', b'"jndex":', 1)),
        ("torn", "generations.jsonl", lambda content: content[:-1]),
        ("torn", "generations.jsonl", lambda content: content + b'{"id": \n'),
    ],
)
def test_doctored_bytes_are_seen_through(
    kind: str, name: str, change: Callable[[bytes], bytes], finished: tuple[Path, Rows], tmp_path: Path
) -> None:
    out, rows = finished
    shutil.copytree(out, tmp_path / "doctored")
    path = tmp_path / "doctored" / name
    assert path.read_bytes() != change(path.read_bytes())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(Fault) as seen:
        check(tmp_path / "doctored", out, rows)
    assert seen.value.kind == kind


def test_a_record_that_survives_a_power_cut_without_its_text_is_seen(
    finished: tuple[Path, Rows], tmp_path: Path
) -> None:
    out, _ = finished
    shutil.copytree(out, tmp_path / "cut")
    batches, text = "batches-00001-00000.jsonl", tmp_path / "cut" / "generations-00001-00000.jsonl"
    said = {batches: (out / batches).read_bytes()}
    check_survived(said, set(), tmp_path / "cut")
    text.write_bytes(text.read_bytes()[:-1])
    with pytest.raises(Fault, match="whose text is not there"):
        check_survived(said, set(), tmp_path / "cut")


def test_a_row_that_runs_past_its_stop_text_is_seen(finished: tuple[Path, Rows]) -> None:
    out, rows = finished
    lines = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    index = next(line["index"] for line in lines if line["finish_reason"] == "length")
    with pytest.raises(Fault, match="did not end at its stop text"):
        check(out, out, replace(rows, stops=frozenset({index})))


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
        (Start("echo", 2, 1, 0.1, kind="kill one", victims=(1,), signals=(signal.SIGKILL,)), 75, False),
        (Start("echo", 2, 1, 0.1, kind="kill one", victims=(1,), signals=(signal.SIGKILL,)), -9, False),
        (Start("echo", 1, 1, 0.1, kind="kill one", victims=(0,), signals=(signal.SIGKILL,)), -9, True),
        (Start("echo", 2, 1, 0.1, kind="kill all", signals=(signal.SIGKILL,)), -9, True),
        # This run has ended: nobody answers.
        (Start("echo", 2, 1, 0.1, kind="stop all", signals=(signal.SIGTERM,)), -15, True),
        (Start("echo", 2, 1, 0.1, kind="stop all", signals=(signal.SIGTERM,)), 4, False),
        (Start("echo", 2, 1, 0.1), 3, True),
        (Start("echo", 2, 1, 0.1), 0, False),
    ],
)
def test_exit_codes_that_may_be_after_a_finished_run(
    start: Start, code: int, fine: bool, finished: tuple[Path, Rows], tmp_path: Path
) -> None:
    out, rows = finished
    (tmp_path / "log").touch()
    place = Place(tmp_path, rows, None, Path(), Path(), False, out, set())
    if fine:
        check_exit(start, code, place, 1, True, tmp_path / "log")
    else:
        with pytest.raises(Fault, match=f"exit code {code}"):
            check_exit(start, code, place, 1, True, tmp_path / "log")
