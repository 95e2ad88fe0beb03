"""A run whose input has rows appended goes on with them; every other change is refused, and the first row is named."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen import Host, RunSettings, Status, checkpoint, run
from batchgen.checkpoint import CheckpointError, RunFolder, attempts, claim
from batchgen.files import write_atomic
from batchgen.formats import Changed
from batchgen.types import Shard, UserError
from batchgen.world import World
from tests.checkpoint.folders import ROOT
from tests.commands.starts import (
    ENVIRONMENT,
    Started,
    batchgen,
    call,
    read_rows,
    recorded,
    slow_echo,
    until,
    write_rows,
)
from tests.runs.test_refused_starts import FORMATS, content, cut_short

LINES = [name for name in FORMATS if "jsonl" in name]


def prompts(*numbers: int) -> list[dict[str, Any]]:
    return [{"prompt": f"prompt {number}"} for number in numbers]


def start(inputs: Path | Sequence[Path], out: Path, shard: Shard | None = None, **settings: Any) -> Status:
    paths = [inputs] if isinstance(inputs, Path) else inputs
    host = Host(ENVIRONMENT, shard=shard or Shard())
    return run([str(path) for path in paths], out, RunSettings(engine="echo", **settings), host=host)


def texts(out: Path) -> list[str]:
    return [row["text"] for row in read_rows(out / "generations.jsonl")]


def expected(count: int) -> list[str]:
    return [f"prompt {number}" for number in range(count)]


def generated(out: Path) -> list[int]:
    """The rows of all records, in the order in which they were committed."""
    return [row for _, record in RunFolder(out).records(verify=True) for row in record.rows]


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_goes_on_with_appended_rows_again_and_again(name: str, is_finished: bool, tmp_path: Path) -> None:
    path, out, write = tmp_path / name, tmp_path / "out", FORMATS[name]
    write(path, prompts(*range(30)))
    start(path, out, batch_size=7)
    if not is_finished:
        cut_short(out)
    done = set(generated(out))
    write(path, prompts(*range(34)))
    status = start(path, out)
    assert (status.state, status.rows, status.good, status.merged) == ("finished", 34, 34, True)
    shutil.rmtree(out / "input")
    write(path, prompts(*range(41)))
    status = start(path.rename(path.with_name(f"moved-{name}")), out)
    assert (status.rows, status.good, len(status.attempts)) == (41, 41, 3)
    assert texts(out) == expected(41)
    assert [row["id"] for row in read_rows(out / "generations.jsonl")] == [f"{name}:{n}" for n in range(1, 42)]
    assert sorted(generated(out)) == list(range(41)), "each row is generated once"
    assert set(generated(out)[: len(done)]) == done
    recorded = json.loads((out / "run.json").read_bytes())
    assert (recorded["asked"]["rows"], recorded["grown"], recorded["inputs"][0]["rows"]) == (41, 2, 41)
    before = content(out)
    write(path, prompts(*range(34)))
    with pytest.raises(Changed):
        start(path, out)
    assert content(out) == before


def test_rows_that_repeat_old_ids_or_are_bad_are_error_rows_and_the_old_ones_stay(tmp_path: Path) -> None:
    path, out = tmp_path / "p.jsonl", tmp_path / "out"
    old = [{"id": "a", "prompt": "one"}, {"id": "b", "prompt": 2}, {"id": "c", "prompt": "three"}]
    write_rows(path, old)
    assert (start(path, out).failed, len(read_rows(out / "errors.jsonl"))) == (1, 1)
    new = [{"id": "d", "prompt": "four"}, {"id": "a", "prompt": "again"}, {"id": "d", "prompt": "too"}, "{no JSON"]
    write_rows(path, [*old, *new])
    status = start(path, out)
    assert (status.rows, status.good, status.failed, status.open, status.exit_code) == (7, 3, 4, 0, 3)
    assert [row["text"] for row in read_rows(out / "generations.jsonl")] == ["one", None, "three", "four", *[None] * 3]
    failed = read_rows(out / "errors.jsonl")
    assert [row["error"]["type"] for row in failed] == ["wrong_type", "duplicate_id", "duplicate_id", "malformed_json"]
    assert "that of line 1 of p.jsonl" in failed[1]["error"]["message"]
    assert "that of line 4 of p.jsonl" in failed[2]["error"]["message"]
    assert call(tmp_path, "status", "out").out.splitlines()[1] == "  rows    3 good, 4 failed, 0 open, of 7"
    assert call(tmp_path, "report", "out").code == 0


FIVE = "".join(json.dumps(row) + "\n" for row in prompts(*range(5)))

# How a file of five rows begins, what it is next, and the rows that it has then; or how the sentence goes on.
CHANGES: dict[str, tuple[str, str, int | str]] = {
    "one more": (FIVE, FIVE + '{"prompt":"x"}\n', 6),
    "one without an end": (FIVE, FIVE + '{"prompt":"x"}', 6),
    "behind a last line without an end": (FIVE[:-1], FIVE + '{"prompt":"x"}\n', 6),
    "behind blank lines": (FIVE, FIVE + '\n \n{"prompt":"x"}\n', 6),
    "an end of the last line": (FIVE[:-1], FIVE, 5),
    "a blank line": (FIVE, FIVE + "\n", 5),
    "a bad one": (FIVE, FIVE + "{", 6),
    "the last line goes on": (FIVE[:-1], FIVE[:-1] + ' {"prompt":"x"}\n', ", first in line 5"),
    "a blank last line goes on": (FIVE + "  ", FIVE + '  {"prompt":"x"}\n', ""),
    "the first": (FIVE, FIVE.replace("prompt 0", "prompt X") + '{"prompt":"x"}\n', ", first in line 1"),
    "the last": (FIVE, FIVE.replace("prompt 4", "prompt X"), ", first in line 5"),
    "behind a blank line": ("\n\n" + FIVE, "\n\n" + FIVE.replace("prompt 3", "prompt X"), ", first in line 6"),
    "one put in": (
        FIVE,
        FIVE.replace('{"prompt": "prompt 2"}', '{"prompt":"x"}\n{"prompt": "prompt 2"}'),
        ", first in line 3",
    ),
    "one taken out": (FIVE, FIVE.replace('{"prompt": "prompt 2"}\n', ""), ", first in line 3"),
    "the last one taken out": (FIVE, FIVE.replace('{"prompt": "prompt 4"}\n', ""), ", only the first 4 of its rows"),
    "two in each other's place": (
        FIVE,
        FIVE.replace("4", "5").replace("1", "4").replace("5", "1"),
        ", first in line 2",
    ),
    "a blank line put in": (FIVE, FIVE.replace("\n", "\n\n", 1) + '{"prompt":"x"}\n', ""),
    "nothing but blanks": (FIVE, FIVE.replace("\n", "\n\n", 1), ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_appended_go_on_and_another_change_names_the_first_row_that_differs(change: str, tmp_path: Path) -> None:
    before, after, outcome = CHANGES[change]
    path, out = tmp_path / "p.jsonl", tmp_path / "out"
    path.write_text(before)
    assert start(path, out).good == 5
    path.write_text(after)
    if isinstance(outcome, int):
        assert start(path, out).rows == outcome
        assert texts(out)[:5] == expected(5)
        assert start(path, out).rows == outcome
        return
    with pytest.raises(Changed) as caught:
        start(path, out)
    assert (
        str(caught.value)
        == f"{path} {Changed.CAUSE}{outcome}. Put it back as it was, or start a new run with another -o"
    )
    path.write_text(before)
    assert start(path, out).good == 5


def test_of_many_rows_the_one_that_differs_is_named(tmp_path: Path) -> None:
    rows, draw = prompts(*range(5000)), random.Random(1)
    path = write_rows(tmp_path / "p.jsonl", rows)
    start(path, tmp_path / "out")
    for number in draw.sample(range(5000), 4):
        write_rows(path, [*rows[:number], {"prompt": "X"}, *rows[number + 1 :], {"prompt": "more"}])
        with pytest.raises(Changed, match=f"first in line {number + 1}\\. Put it back"):
            start(path, tmp_path / "out")


def test_files_are_appended_behind_those_that_are_there(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", prompts(0, 1))
    FORMATS["p.jsonl.gz"](tmp_path / "c.jsonl.gz", prompts(2))
    pattern, out = tmp_path / "*.*", tmp_path / "out"
    start(pattern, out)
    FORMATS["p.parquet"](tmp_path / "d.parquet", prompts(3, 4))
    write_rows(tmp_path / "e.jsonl", prompts(5))
    assert start(pattern, out).rows == 6
    write_rows(tmp_path / "e.jsonl", prompts(5, 6))
    FORMATS["p.arrow"](tmp_path / "f.arrow", prompts(7))
    assert start(pattern, out).rows == 8
    assert texts(out) == expected(8)
    names = [
        "b.jsonl:1",
        "b.jsonl:2",
        "c.jsonl.gz:1",
        "d.parquet:1",
        "d.parquet:2",
        "e.jsonl:1",
        "e.jsonl:2",
        "f.arrow:1",
    ]
    assert [row["id"] for row in read_rows(out / "generations.jsonl")] == names
    before = content(out)
    refuse = Refusal(pattern, out)
    FORMATS["p.jsonl.gz"](tmp_path / "c.jsonl.gz", prompts(2, 9))
    refuse("c.jsonl.gz is not", "2 rows where it had 1, before rows of other files. Rows can be appended to the last")
    FORMATS["p.jsonl.gz"](tmp_path / "c.jsonl.gz", prompts(2))
    write_rows(tmp_path / "a.jsonl", prompts(9))
    refuse("a.jsonl is not", "first in line 1. There are further files, which must come behind the 5 it began with")
    (tmp_path / "a.jsonl").unlink()
    FORMATS["p.arrow"](tmp_path / "f.arrow", prompts(7, 8))
    refuse("f.arrow is not", "2 rows where it had 1. New rows of a table go into a file of their own")
    (tmp_path / "f.arrow").unlink()
    refuse("the input of 4 files", "4 of 5 files")
    FORMATS["p.arrow"](tmp_path / "f.arrow", prompts(7))
    (tmp_path / "g").mkdir()
    (tmp_path / "b.jsonl").rename(tmp_path / "a-moved.jsonl")
    write_rows(tmp_path / "g" / "b.jsonl", prompts(8))
    with pytest.raises(UserError, match="is a further file, but has the name of one that the run began with"):
        start([pattern, tmp_path / "g" / "b.jsonl"], out)
    assert content(out) == before
    (tmp_path / "g" / "b.jsonl").rename(tmp_path / "g" / "z.jsonl")
    assert start([*sorted(tmp_path.glob("*.*")), tmp_path / "g" / "z.jsonl"], out).rows == 9
    assert texts(out) == expected(9)


class Refusal:
    """A start that must be refused."""

    def __init__(self, inputs: Path, out: Path) -> None:
        self._inputs, self._out = inputs, out

    def __call__(self, *sentences: str) -> None:
        with pytest.raises(Changed) as caught:
            start(self._inputs, self._out)
        assert all(sentence in str(caught.value) for sentence in sentences), str(caught.value)


def test_a_table_that_was_written_as_a_table_is_merged_with_the_new_file_of_it(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "n": 1}]), tmp_path / "a.parquet")
    start(tmp_path / "a.parquet", tmp_path / "out", output_format="parquet")
    pq.write_table(pa.Table.from_pylist([{"prompt": "b", "n": 2}]), tmp_path / "b.parquet")
    start([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "out", output_format="parquet")
    merged = pq.read_table(tmp_path / "out" / "generations.parquet")
    assert (merged["text"].to_pylist(), merged.num_rows) == (["a", "b"], 2)


def test_shards_go_on_with_their_part_of_the_new_rows(tmp_path: Path) -> None:
    path, out = write_rows(tmp_path / "p.jsonl", prompts(*range(11))), tmp_path / "out"
    start(path, out, Shard(0, 3))
    write_rows(path, prompts(*range(20)))
    counts = [start(path, out, Shard(index, 3)) for index in (1, 2)]
    assert [(status.rows, status.good, status.open) for status in counts] == [(7, 7, 0), (6, 6, 0)]
    assert not checkpoint.status(RunFolder(out)).merged
    assert checkpoint.status(RunFolder(out)).shards == ["failed", "finished", "finished"]
    write_rows(path, prompts(*range(23)))
    for index in (1, 0, 2):
        start(path, out, Shard(index, 3))
    assert texts(out) == expected(23)
    assert sorted(generated(out)) == list(range(23))


def test_no_start_takes_new_rows_while_another_shard_is_worked_on(tmp_path: Path) -> None:
    path, out = write_rows(tmp_path / "p.jsonl", prompts(*range(6))), tmp_path / "out"
    start(path, out, Shard(0, 2))
    worker = claim(RunFolder(out), World(), {}, 5.0, shard=Shard(1, 2))  # of this process, which lives
    before = content(out)
    write_rows(path, prompts(*range(8)))
    with pytest.raises(
        CheckpointError, match=r"rows have been appended to the input.*process \d+ on .*shard 1/2 works"
    ):
        start(path, out, Shard(0, 2))
    assert content(out) == before
    worker.end("finished")
    assert start(path, out, Shard(0, 2)).good == 4
    assert start(path, out, Shard(1, 2)).merged
    assert texts(out) == expected(8)


def test_a_file_that_grows_while_a_run_reads_it_is_done_by_the_next_start(tmp_path: Path) -> None:
    rows = prompts(*range(60))
    path, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out"
    words = [*slow_echo(path, "-o", out), "--set", "seconds=0.1"]
    with Started(batchgen(*words, "--ranks", 2), tmp_path) as process:
        until(lambda: recorded(out), process)
        write_rows(path, prompts(*range(66)))
        refused = call(tmp_path, *words)
        assert (refused.code, "is in use" in refused.err) == (4, True), refused.err
        process.send(signal.SIGKILL)
        process.end()
    assert recorded(out) < 60
    assert call(tmp_path, *words, "--ranks", 3).code == 0
    assert texts(out) == expected(66)
    assert sorted(generated(out)) == list(range(66))


APPEND = """
import sys, time
from pathlib import Path
from batchgen.checkpoint import CheckpointError, RunFolder
from batchgen.formats import Original
folder, rows = RunFolder(Path(sys.argv[1])), int(sys.argv[3])
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
try:
    folder.append_input({"input": "a", "rows": 2}, {"input": f"b{rows}", "rows": rows}, [Original("p", "d", rows, 9)])
    print("mine")
except CheckpointError as error:
    print(error)
"""


def test_of_starts_that_append_at_the_same_moment_one_decides_and_who_found_the_same_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.make()
    folder.check_or_create({"input": "a", "rows": 2}, {})
    at = str(time.time() + 2)
    found = [3, 3, 4, 5]
    processes = [
        subprocess.Popen([sys.executable, "-c", APPEND, folder.path, at, str(rows)], stdout=-1, text=True, cwd=ROOT)
        for rows in found
    ]
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    rows = folder.read_identity()["rows"]
    assert [outcome == "mine" for outcome in said] == [mine == rows for mine in found]
    assert all("has found other rows in the input. Start again" in one for one in said if one != "mine")
    assert [path.name for path in sorted(folder.path.glob("grown-*"))] == ["grown-00001.json"]
    originals = folder.originals()
    assert originals is not None
    assert originals[0].rows == rows


@pytest.mark.parametrize("lost", ["before run.json", "in the middle"])
def test_what_a_kill_leaves_of_an_append_is_completed(lost: str, tmp_path: Path) -> None:
    path, out = write_rows(tmp_path / "p.jsonl", prompts(*range(3))), tmp_path / "out"
    start(path, out)
    first = (out / "run.json").read_bytes()
    write_rows(path, prompts(*range(5)))
    start(path, out)
    write_atomic(out / "run.json", first)  # `grown-00001.json` came first
    if lost == "in the middle":
        cut_short(out)
    assert checkpoint.status(RunFolder(out)).rows == 5
    assert start(path, out).good == 5
    write_rows(path, prompts(*range(6)))
    assert start(path, out).good == 6
    assert json.loads((out / "run.json").read_bytes())["grown"] == 2
    assert texts(out) == expected(6)


LEFT = Path(__file__).parents[1] / "checkpoint" / "left_before_growing"


@pytest.mark.parametrize("has_cache", [True, False])
def test_a_run_that_an_earlier_version_left_goes_on_with_its_input_and_with_more_of_it(
    has_cache: bool, tmp_path: Path
) -> None:
    """Its manifest has no lengths of the files; its cache has them, if it is still there."""
    out = Path(shutil.copytree(LEFT / "half_done", tmp_path / "out"))
    files = [Path(shutil.copy(LEFT / name, tmp_path)) for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl")]
    if not has_cache:
        shutil.rmtree(out / "input")
    counts = checkpoint.status(RunFolder(out))
    assert (counts.good, counts.open) == (7, 5)
    before, lines = content(out), files[0].read_bytes()
    files[0].write_bytes(lines.replace(b"row 1", b"row X"))
    with pytest.raises(Changed) as caught:
        start(files, out)
    assert str(caught.value).startswith(f"{files[0]} {Changed.CAUSE}. Put it back"), "it has not recorded its rows"
    assert content(out) == before
    files[0].write_bytes(lines)
    more = write_rows(tmp_path / "d.jsonl", [{"prompt": "row 12 of twelve"}])
    if has_cache:
        with files[2].open("ab") as file:
            file.write(b'{"prompt": "row 12 of twelve"}\n')
    status = start(files if has_cache else [*files, more], out)
    assert (status.rows, status.good, status.merged) == (13, 13, True)
    assert texts(out) == [f"row {number} of twelve" for number in range(13)]
    assert len(attempts(RunFolder(out))) == 2
