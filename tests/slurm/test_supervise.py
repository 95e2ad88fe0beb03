"""What a job does after a start that was not enough, without a Slurm: chained jobs ask it for nothing."""

from __future__ import annotations

import sys
from pathlib import Path

from batchgen import slurm
from tests.commands.starts import Ended, call, echo, found, prompts, read_rows, write_rows

ROOT = Path(__file__).parents[2]

# For sitecustomize: there is no room for the answers beside the run folder.
FULL = """
import shutil
def full(*files):
    raise OSError(28, "No space left on device")
shutil.copyfile = full
"""

BATCHGEN = Path(sys.executable).with_name("batchgen")


def job(folder: Path, number: int, *words: object, after: int | None = None) -> Ended:
    """Job `number` of a chain, which follows job `after`."""
    environment = {"SLURM_JOB_ID": str(number), "PYTHONPATH": f"{folder}:{ROOT}"}
    if after is not None:
        environment["SLURM_JOB_DEPENDENCY"] = f"afternotok:{after}"
    return call(folder, "job", "--chained", "--", BATCHGEN, *words, environment=environment)


def test_answers_that_cannot_be_delivered_are_delivered_by_the_next_start_or_given_up(tmp_path: Path) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    write_rows(tmp_path / "in.jsonl", [line])
    words = ["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--run-folder", "rf", "--engine", "echo"]
    (tmp_path / "sitecustomize.py").write_text(FULL)
    first = job(tmp_path, 1, *words)
    assert first.code == 75, first.err
    assert "every row is done, but the answers are not written yet" in first.err
    again = job(tmp_path, 2, *words, after=1)
    assert again.code == 4, again.err
    assert "not starting again: every row is done, but the answers could not be written" in again.err
    (tmp_path / "rf" / "jobs" / "2.ended.json").unlink()  # as if it had not been tried again
    (tmp_path / "sitecustomize.py").write_text("")
    last = job(tmp_path, 3, *words, after=1)
    assert last.code == 0, last.err
    assert [row["custom_id"] for row in read_rows(tmp_path / "out.jsonl")] == ["a"]
    done = job(tmp_path, 4, *words, after=3)
    assert (done.code, "the run is finished; nothing is left to do" in done.err) == (0, True)


def test_a_start_that_has_learnt_that_a_batch_was_too_large_is_not_in_vain(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", prompts(5))
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'run' in sys.argv[1:2]:\n"
        "    from batchgen.engine import OutOfStep\n"
        "    from batchgen.engines.echo import Echo\n"
        "    def generate(self, prompts, stop):\n"
        "        error = OutOfStep('out of memory in a batch')\n"
        "        error.length, error.rows = 8, 4\n"
        "        raise error\n"
        "        yield\n"
        "    Echo.generate = generate\n"
    )
    environment = {"SLURM_JOB_ID": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    words = ["job", "--chained", "--", BATCHGEN, *echo(rows, "-o", "out")]
    for _ in range(2):
        ended = call(tmp_path, *words, environment=environment)
        assert ended.code == 75, ended.err
        assert "batches of that size do not fit; the next start makes smaller ones" in ended.err
    assert found(tmp_path / "out").open == 5


def test_too_many_errors_are_not_tried_again(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", ["{broken", *prompts(20)])
    ended = job(tmp_path, 1, *echo(rows, "-o", "out", "--max-error-rate", "0", "--batch-size", "5"))
    assert ended.code == 4, ended.err
    assert "not starting again: 1 of this stream's 21 rows have failed, more than --max-error-rate allows" in ended.err


def test_a_task_of_other_shards_is_not_the_one_before_it_in_the_chain(tmp_path: Path) -> None:
    slurm.remember(tmp_path / "out", slurm.Job("1", 0, shards=9, offset=0))
    (tmp_path / "out" / "jobs" / "1_2.ended.json").write_text('{"outcome": "gave up", "why": "of its own"}')
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    for offset, given_up in ((0, True), (5, False)):
        environment = {"SLURM_ARRAY_JOB_ID": "2", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": f"2{offset}"}
        environment["SLURM_JOB_DEPENDENCY"] = "afterany:1"
        words = ["true", "batchgen", "run", "p.jsonl", "-o", "out", "--shard", f"{2 + offset}/9"]
        ended = call(tmp_path, "job", "--chained", "--", *words, environment=environment)
        assert ended.code == 4
        assert ("not starting again: of its own" in ended.err) is given_up, ended.err
        (tmp_path / "out" / "jobs" / "2.json").unlink()
