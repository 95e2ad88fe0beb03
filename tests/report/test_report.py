"""`batchgen report` over all kinds of run folders: finished, killed, working, empty, of errors alone, of shards."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from batchgen import slurm
from batchgen.checkpoint import RunFolder
from batchgen.report import write
from batchgen.report.plots import NAMES
from batchgen.slurm.records import GAVE_UP, note_end
from tests.checkpoint.folders import batch, commit, died, edit, made
from tests.commands.starts import Started, batchgen, call, echo, prompts, recorded, slow_echo, until, write_rows
from tests.report import folders

PLOTS = set(NAMES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.finished(tmp_path_factory.mktemp("finished"))


def text_of(page: Path) -> str:
    """What a person reads, without style, script and drawings."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<(style|script|svg)\b.*?</\1>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", text)))


def report(folder: Path, **options: Any) -> str:
    asked = {"rows": 100_000, "text_characters": 2000} | options
    made = write(RunFolder(folder), folder / "report.html", folder / "report-plots", **asked)
    assert made.size == made.page.stat().st_size
    return text_of(made.page)


def test_page_and_plots_lie_in_the_run_folder_and_nothing_of_the_run_is_touched(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    ended = call(finished.parent, "report", "out")
    assert (ended.code, ended.out) == (0, "out/report.html\n")
    assert re.fullmatch(r"batchgen: [\d.]+ kB; 5 plots in out/report-plots\n", ended.err)
    images = {path.stem: path.read_bytes() for path in (finished / "report-plots").iterdir()}
    assert images.keys() == PLOTS - {"errors"}
    assert all(image.startswith(b"\x89PNG") for image in images.values())
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and "report" not in str(path)}
    assert after == before
    # A run that goes on in the folder is not in the way of its report, nor the report in the run's.
    assert call(finished.parent, *echo("prompts.jsonl", "-o", "out")).code == 0
    assert (finished / "report.html").exists()


def test_page_says_what_a_killed_and_resumed_run_has_cost(finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "mine.html"
    page.parent.mkdir()
    ended = call(tmp_path, "report", finished, "--output", "pages/mine.html", "--plots", "images")
    assert (ended.code, ended.out) == (0, "pages/mine.html\n")
    text = text_of(page)
    assert "out finished dtype auto, engine echo, greedy, at most 128 new tokens" in text
    assert "rows finished 300 300 good, 0 failed, 0 open" in text
    # A kill loses what no heartbeat has counted.
    assert re.search(r"between attempts [\d.]+ m?s (no lost token is known of; what died|[\d,]+ tokens were)", text)
    assert re.search(r"in [12] pauses?; the longest took [\d.]+ m?s", text)
    attempts = re.findall(
        r"(\d) 20\d\d-\d\d-\d\d [\d:]+ [\d.]+ m?s (\w+) (\d+) 0 \S+ \S+ echo (?:5|by memory) ([12]) \S", text
    )
    assert [(number, how, ranks) for number, how, _, ranks in attempts[:2]] == [
        ("1", "died", "2"),
        ("2", "finished", "1"),
    ]
    assert sum(int(rows) for _, _, rows, _ in attempts) == 300
    assert "None of" in text  # echo pads nothing, and the page says so
    assert {path.stem for path in (tmp_path / "images").iterdir()} == PLOTS - {"errors"}


def test_page_says_what_failed_and_gives_an_example_of_each_kind(tmp_path: Path) -> None:
    text = report(folders.with_errors(tmp_path))
    assert "121 good, 3 failed" not in text
    assert "122 good, 3 failed, 0 open" in text
    assert re.search(
        r"malformed_json 1 row 121, p\.jsonl:122: line 122 of p\.jsonl is not valid JSON|malformed_json 1", text
    )
    assert "missing_prompt 1 row 122, no-prompt:" in text
    assert f"wrong_type 1 row 123, {folders.EVIL}:" in text
    assert "Of 1 row a text is cut after 2,000 characters" in text


def test_run_that_works(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "prompts.jsonl", prompts(400))
    out = tmp_path / "out"
    with Started(batchgen(*slow_echo(rows, "-o", out)), tmp_path) as process:
        until(lambda: recorded(out) > 10, process)
        text = report(out)
        assert process.runs()
    assert "out running" in text
    assert re.search(r"rows finished [\d.]+\s% \d+ good, 0 failed, \d+ open", text)
    assert re.search(r"Attempts .* 1 20\S+ \S+ \S+ m?s works", text)


def only_claimed(folder: Path) -> Path:
    run = made(folder, 5)
    died(run)
    return run.path


def never_begun(folder: Path) -> Path:
    return made(folder, 5).path


@pytest.mark.parametrize("make", [only_claimed, never_begun])
def test_run_without_a_batch(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    text = report(make(tmp_path))
    assert "No batch is recorded yet, so there is nothing to draw." in text
    assert "No row is finished yet." in text
    assert not list((tmp_path / "run" / "report-plots").iterdir())


def test_run_of_errors_alone(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", [{"prompt": 1}, {"prompt": 2}])
    assert call(tmp_path, *echo(rows, "-o", "out")).code == 3
    text = report(tmp_path / "out")
    assert "wrong_type 2 row 0, p.jsonl:1:" in text
    assert {path.stem for path in (tmp_path / "out/report-plots").iterdir()} == {"batch-latency", "errors"}


def test_rows_are_read_from_what_the_attempts_wrote_whatever_was_merged(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", prompts(30))
    assert call(tmp_path, *echo(rows, "-o", "out", "--output-format", "parquet")).code == 0
    assert "rows finished 30" in report(tmp_path / "out")


def test_shards_of_a_run_have_their_names_and_their_time(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", prompts(30))
    assert call(tmp_path, *echo(rows, "-o", "out", "--shard", "0/2")).code == 0
    assert "15 good, 0 failed, 15 open" in report(tmp_path / "out")
    assert call(tmp_path, *echo(rows, "-o", "out", "--shard", "1/2")).code == 0
    text = report(tmp_path / "out")
    assert "1 0/2 20" in text
    assert "2 1/2 20" in text


def test_answers_to_openai_requests(tmp_path: Path) -> None:
    def request(name: str, **body: object) -> dict[str, object]:
        return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}

    rows = write_rows(tmp_path / "r.jsonl", [request("a", prompt="hello"), request("b", prompt="x", stream=True)])
    assert call(tmp_path, "run-batch", "-i", rows, "-o", "answers.jsonl", "--engine", "echo").code == 3
    assert call(tmp_path, *echo(rows, "-o", "out")).code == 3
    assert "error 1 row 1, b: Request must not be sent in stream mode" in report(tmp_path / "answers.jsonl.run")
    text = report(tmp_path / "out")
    assert "1 good, 1 failed" in text
    assert "stream 1 row 1, b: line 2 of r.jsonl" in text
    assert "The run folder does not hold the prompts of these rows: they are in the input." in text


def test_page_can_be_written_without_rows_or_with_a_sample_of_them(tmp_path: Path) -> None:
    folder = made(tmp_path, 60)
    died(folder)
    commit(folder, 1, 0, batch(range(40), failed=range(30, 34)), batch(range(40, 60), text="a secret"))
    assert "This page was asked to leave the rows out." in report(folder.path, rows=0)
    text = report(folder.path, rows=10)
    assert "14 of 60 finished rows are here: all failed rows and a uniform sample of 10 good ones." in text
    text = report(folder.path, rows=3)
    assert "6 of 60 finished rows are here: a uniform sample of 3 failed rows and" in text
    assert "too_long 4 row 30, r30: row 30 is too long" in text  # of all, not of the sample


def test_what_is_mended_is_not_drawn_any_more(tmp_path: Path) -> None:
    folder = made(tmp_path, 4)
    died(folder)
    commit(folder, 1, 0, batch(range(4), failed=[1]))
    assert "too_long 1 row 1" in report(folder.path)
    assert (folder.path / "report-plots/errors.png").exists()
    died(folder)
    commit(folder, 2, 0, batch([1]))
    text = report(folder.path)
    assert "What failed" not in text
    assert "4 good, 0 failed, 0 open" in text
    assert {path.stem for path in (folder.path / "report-plots").iterdir()} == PLOTS - {"errors"}


def test_damaged_generations_are_left_out_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = made(tmp_path, 20)
    died(folder)
    generations, _ = commit(folder, 1, 0, batch(range(10)), batch(range(10, 20)))
    data = bytearray(generations.read_bytes())
    data[20] ^= 1
    generations.write_bytes(data)
    assert "20 rows" not in report(folder.path)


def test_hours_of_gpus_are_those_of_all_that_its_ranks_hold(tmp_path: Path) -> None:
    folder = made(tmp_path, 5)
    attempt = died(folder, ranks=2)
    commit(folder, 1, 0, batch([0, 1]))
    now = time.time()
    began = now - 3600
    edit(attempt.path, started=began, ended="stopped by SIGTERM", ended_at=now, engine="accelerate")
    for rank in range(2):
        edit(folder.attempts / f"00001-{rank:05d}.json", time=now, devices=["NVIDIA A100"] * 3, ready=began + 60)
    text = report(folder.path)
    assert re.search(r"GPU time 6 h [\d,.]+ tokens a GPU hour; NVIDIA A100", text)
    assert "6 x A100" in text
    assert "starting and loading 1.7 %, 2 min behind a rank's last recorded batch 49 %, 59 min" in text


def test_hours_of_gpus_include_those_of_ranks_that_were_killed_while_they_loaded(tmp_path: Path) -> None:
    folder = made(tmp_path, 5)
    now = time.time()
    for hours, gpus, loaded in ((4, 3, True), (2, 3, False), (1, 1, False)):  # of each of two ranks
        attempt = died(folder, ranks=2)
        began = now - hours * 3600
        edit(attempt.path, started=began, ended="killed", ended_at=began + 3600, engine=f"like {gpus}", ranks=2)
        held: dict[str, object] = {"devices": ["NVIDIA A100"] * gpus, "ready": began + 60} if loaded else {}
        for rank in range(2):
            beat = folder.attempts / f"{attempt.number:05d}-{rank:05d}.json"
            edit(beat, **{"time": began + 3600, "devices": [], "ready": None} | held)
    # 2 x 3 that are recorded, 2 x 3 like those, and where no other attempt was alike one a rank.
    text = report(folder.path)
    assert "batches that are recorded 0 %, 0 s" in text
    assert re.search(r"GPU time 14 h [^;]+; NVIDIA A100; 8 h of it by ranks that had not loaded, counted like", text)
    assert text.count("not recorded") == 2


def only_emptied(folder: RunFolder) -> None:
    for path in folder.attempts.glob("?????.json"):
        path.write_bytes(b"")


def all_gone(folder: RunFolder) -> None:
    shutil.rmtree(folder.attempts)
    folder.attempts.mkdir()


@pytest.mark.parametrize("damage", [only_emptied, all_gone])
def test_an_attempt_without_its_claim_begins_with_what_else_is_known(
    tmp_path: Path, damage: Callable[[RunFolder], None]
) -> None:
    folder = made(tmp_path, 6)
    died(folder)
    commit(folder, 1, 0, batch([0, 1, 2]), batch([3, 4, 5]))
    damage(folder)
    text = report(folder.path)
    assert "1970" not in text
    assert re.search(r"From 20\S+ \S+ to 20\S+ \S+: [12](\.\d)? s, 1 attempt\.", text)  # the batches take 0.5 and 1.5 s
    assert "not known: its claim is damaged or gone 6 0" in text


def test_an_attempt_of_which_nothing_is_left_but_an_empty_claim_is_not_listed(tmp_path: Path) -> None:
    folder = made(tmp_path, 5)
    died(folder)
    only_emptied(folder)
    died(folder)
    (folder.attempts / "00001-00000.json").write_bytes(b"")
    text = report(folder.path)
    assert "1970" not in text
    assert "1 attempt." in text
    assert "Not listed, since no file tells when it was: attempt 1." in text


def test_jobs_that_have_given_up_say_why(tmp_path: Path) -> None:
    folder = made(tmp_path, 5)
    slurm.remember(folder.path, slurm.Job("12", 0.0))
    note_end(folder.path, "12", GAVE_UP, "3 starts in a row have finished no row")
    assert call(tmp_path, "report", "run").code == 0
    assert "Job 12 gave up: 3 starts in a row have finished no row" in text_of(folder.path / "report.html")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none"], "there is no run folder none"),
        (["."], "is not a run folder: it has no run.json"),
        (["run", "--output", "run/generations.jsonl"], "the page is HTML, so its name must end in .html"),
        (["run", "--output", "run/run.json/page.html"], "cannot write run/run.json/page-plots: Not a directory"),
    ],
)
def test_what_cannot_be_reported_is_exit_4(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    made(tmp_path, 5)
    ended = call(tmp_path, "report", *arguments)
    assert (ended.code, ended.out) == (4, "")
    assert sentence in ended.err
    assert "Traceback" not in ended.err


def test_same_folder_gives_the_same_drawings(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("report*"))
    pages = []
    for _ in range(2):
        report(copy)
        text = (copy / "report.html").read_text(encoding="utf-8")
        pages.append(re.sub(r"Written by .*", "", text))
    assert pages[0] == pages[1]
