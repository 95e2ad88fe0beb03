"""`batchgen run`: what it reads, writes and says, and its exit codes."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.commands.starts import call, echo, found, prompts, read_rows, write_rows

RESULT = ["id", "index", "text", "finish_reason", "prompt_tokens", "generated_tokens", "error"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", prompts(20))


def test_all_rows_good_is_exit_0_and_stdout_is_the_path_of_the_generations(tmp_path: Path, rows: Path) -> None:
    ended = call(tmp_path, *echo(rows, "-o", "out"))
    assert (ended.code, ended.out) == (0, "out/generations.jsonl\n")
    assert "finished; 20 of 20 rows good, 0 failed, 0 open" in ended.err
    merged = read_rows(tmp_path / "out/generations.jsonl")
    assert [(row["id"], row["text"]) for row in merged] == [(row["id"], row["prompt"]) for row in prompts(20)]
    assert (tmp_path / "out/errors.jsonl").read_bytes() == b""


def test_merged_row_has_the_result_then_its_own_columns(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", [{"prompt": "abcdef", "label": 7, "text": "mine", "max_new_tokens": 4}])
    assert call(tmp_path, *echo(rows)).code == 0
    [row] = read_rows(tmp_path / "p/generations.jsonl")
    assert list(row) == [*RESULT, "prompt", "label", "input_text", "max_new_tokens"]
    assert row["id"] == "p.jsonl:1"
    assert (row["text"], row["finish_reason"]) == ("abcd", "length")
    assert (row["prompt_tokens"], row["generated_tokens"], row["error"]) == (6, 4, None)


def test_timing_has_a_record_for_every_batch(tmp_path: Path, rows: Path) -> None:
    assert call(tmp_path, *echo(rows, "-o", "out"), "--batch-size", 8).code == 0
    batches = read_rows(tmp_path / "out/timing.jsonl")
    assert [batch["prompts"] for batch in batches] == [8, 8, 4]
    assert [batch["first"] for batch in batches] == [True, False, False]
    wanted = {"seconds", "prompts", "prompt_tokens", "generated_tokens", "padded_tokens", "tokens_per_second"}
    assert wanted | {"peak_memory_bytes", "attempt", "rank", "first"} <= batches[0].keys()


def test_failed_rows_are_exit_3_and_stand_in_both_files_with_their_line(tmp_path: Path) -> None:
    bad = ["{broken", {"prompt": 7}, {"no": "prompt"}, "", {"prompt": "twice", "id": "good"}, {"prompt": ""}]
    rows = write_rows(tmp_path / "p.jsonl", [{"id": "good", "prompt": "good"}, *bad])
    ended = call(tmp_path, *echo(rows))
    assert (ended.code, ended.out) == (3, "p/generations.jsonl\n")
    assert "p/errors.jsonl" in ended.err
    merged, errors = read_rows(tmp_path / "p/generations.jsonl"), read_rows(tmp_path / "p/errors.jsonl")
    assert [row["index"] for row in merged] == list(range(6))  # a blank line is no row
    assert errors == merged[1:]
    assert [row["error"]["line"] for row in errors] == [2, 3, 4, 6, 7]
    kinds = ["malformed_json", "wrong_type", "missing_prompt", "duplicate_id", "empty_prompt"]
    assert [row["error"]["type"] for row in errors] == kinds
    assert [row["text"] for row in errors] == [None] * 5


def test_rows_that_failed_are_tried_again_and_stay_once(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", ["{broken", {"prompt": "good"}])
    assert [call(tmp_path, *echo(rows)).code for _ in range(2)] == [3, 3]
    assert [attempt.ended for attempt in found(tmp_path / "p").attempts] == ["finished", "finished"]
    assert len(read_rows(tmp_path / "p/generations.jsonl")) == 2
    assert len(list((tmp_path / "p").glob("generations-*.jsonl"))) == 1  # nothing was done or written again


def test_run_of_nothing_but_bad_rows_is_finished(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", ["{broken"] * 5000)
    assert call(tmp_path, *echo(rows)).code == 3
    assert len(read_rows(tmp_path / "p/errors.jsonl")) == 5000
    # Recorded window by window: a file of the wrong kind with ten million rows must not pile up.
    assert [batch["prompts"] for batch in read_rows(tmp_path / "p/timing.jsonl")] == [2048, 2048, 904]


def test_input_without_rows_is_refused(tmp_path: Path) -> None:
    ended = call(tmp_path, *echo(write_rows(tmp_path / "p.jsonl", [])))
    assert (ended.code, ended.out) == (4, "")
    assert "there is no row in" in ended.err
    assert not list((tmp_path / "p").glob("generations*"))


def test_second_start_of_a_finished_run_generates_nothing(tmp_path: Path, rows: Path) -> None:
    assert call(tmp_path, *echo(rows, "-o", "out")).code == 0
    before = (tmp_path / "out/generations.jsonl").read_bytes()
    assert call(tmp_path, *echo(rows, "-o", "out"), "--ranks", 2).code == 0
    assert (tmp_path / "out/generations.jsonl").read_bytes() == before
    first, second = found(tmp_path / "out").attempts
    assert first.generated_tokens > 0
    assert second.generated_tokens == 0


def test_run_folder_records_what_was_asked_and_every_attempt_what_it_ran_on(tmp_path: Path, rows: Path) -> None:
    call(tmp_path, *echo(rows, "-o", "out"), "--set", "seconds=0.001", "--max-new-tokens", 9)
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["asked"]["rows"] == 20
    assert record["asked"]["sampling.max_new_tokens"] == 9
    assert "engine" not in record["asked"]
    attempt = json.loads((tmp_path / "out/attempts/00001.json").read_text())
    assert (attempt["engine"], attempt["settings"], attempt["ranks"]) == ("echo", {"seconds": 0.001}, 1)
    assert attempt["versions"].keys() >= {"torch", "transformers", "batchgen"}
    assert attempt["command"][1:] == [
        *map(str, echo(rows, "-o", "out")),
        *["--set", "seconds=0.001"],
        *attempt["command"][-2:],
    ]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("some.prompts.jsonl", "some"),
        ("*.jsonl", "out"),
        ("some*.jsonl", "some"),
        ("./some.prompts.jsonl", "some"),
    ],
)
def test_run_folder_is_named_after_the_input(tmp_path: Path, name: str, folder: str) -> None:
    write_rows(tmp_path / "some.prompts.jsonl", prompts(1))
    assert call(tmp_path, *echo(name)).out == f"{folder}/generations.jsonl\n"


def test_run_folder_is_never_the_input_folder(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"prompt": "hello"}]).save_to_disk(tmp_path / "saved")
    before = sorted((tmp_path / "saved").iterdir())
    assert call(tmp_path, *echo("saved")).out == "saved-out/generations.jsonl\n"
    assert sorted((tmp_path / "saved").iterdir()) == before


def test_several_files_globs_and_packed_files_are_one_input(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_rows(tmp_path / f"part-{name}.jsonl", [{"prompt": name}])
    with gzip.open(tmp_path / "z.jsonl.gz", "wt") as file:
        file.write('{"prompt": "z"}\n')
    pq.write_table(pa.table({"prompt": ["p"]}), tmp_path / "p.parquet")
    assert call(tmp_path, *echo("z.jsonl.gz", "part-*.jsonl", "p.parquet", "-o", "out")).code == 0
    merged = read_rows(tmp_path / "out/generations.jsonl")
    assert [row["text"] for row in merged] == ["z", "a", "b", "p"]
    assert [row["id"] for row in merged] == ["z.jsonl.gz:1", "part-a.jsonl:1", "part-b.jsonl:1", "p.parquet:1"]


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_output_format_is_written_typed_and_named_on_stdout(tmp_path: Path, rows: Path, format: str) -> None:
    ended = call(tmp_path, *echo(rows, "-o", "out"), "--output-format", format)
    assert (ended.code, ended.out) == (0, f"out/generations.{format}\n")
    path = tmp_path / f"out/generations.{format}"
    table = pq.read_table(path) if format == "parquet" else pa.ipc.open_file(path).read_all()
    assert table.column("text").to_pylist() == [row["prompt"] for row in prompts(20)]
    assert table.schema.field("index").type == pa.int64()


def test_template_and_prompt_column_choose_the_prompt(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", [{"question": "why?", "n": 2}])
    (tmp_path / "t.jinja").write_text("{{ n }}: {{ question }}")
    assert call(tmp_path, *echo(rows, "-o", "a"), "--template", "@t.jinja").code == 0
    assert call(tmp_path, *echo(rows, "-o", "b"), "--prompt-column", "question").code == 0
    assert call(tmp_path, *echo(rows, "-o", "c")).code == 3
    texts = [read_rows(tmp_path / name / "generations.jsonl")[0]["text"] for name in "abc"]
    assert texts == ["2: why?", "why?", None]


def test_rows_set_their_own_parameters(tmp_path: Path) -> None:
    rows = [{"prompt": "abcdef", "max_new_tokens": 2}, {"prompt": "abcdef"}, {"prompt": "abcdef", "max_new_tokens": 0}]
    assert call(tmp_path, *echo(write_rows(tmp_path / "p.jsonl", rows)), "--max-new-tokens", 4).code == 3
    assert [row["text"] for row in read_rows(tmp_path / "p/generations.jsonl")] == ["ab", "abcd", None]


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", ["{broken", {"prompt": "the first prompt"}])
    ended = call(tmp_path, *echo(rows), "--dry-run", "--ranks", 3, environment={"TMPDIR": str(tmp_path)})
    assert ended.code == 0
    assert ended.out.endswith("first prompt (p.jsonl:2, 16 tokens):\nthe first prompt\n")
    assert "bad row:  line 1 of p.jsonl is not valid JSON" in ended.out
    assert "ranks:    3" in ended.out
    assert "looked at" not in ended.out
    assert list(tmp_path.iterdir()) == [rows]


def test_a_dry_run_of_many_rows_says_how_many_it_has_looked_at(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", [{"prompt": "good"}] * 150 + ["{broken"])
    ended = call(tmp_path, *echo(rows), "--dry-run")
    assert ended.code == 0
    assert "looked at the first 100 of 151 rows; --engine echo --strict looks at all of them" in ended.out
    assert "bad row" not in ended.out


def test_max_error_rate_stops_a_doomed_run_and_every_next_start_of_it(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", ["{broken"] * 5 + [{"prompt": str(n)} for n in range(95)])
    command = [*echo(rows), "--max-error-rate", 0.04, "--batch-size", 10]
    first, second = call(tmp_path, *command), call(tmp_path, *command)
    assert (first.code, second.code) == (75, 75)
    assert "5 of this stream's 100 rows have failed, more than --max-error-rate allows" in first.err
    assert "line 5 of p.jsonl is not valid JSON" in first.err
    assert found(tmp_path / "p").good == 20  # one batch each
    assert "more than --max-error-rate allows" in str(found(tmp_path / "p").attempts[0].ended)
    assert call(tmp_path, *echo(rows), "--max-error-rate", 0.05).code == 3


def test_strict_names_the_bad_lines_and_generates_nothing(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", [{"prompt": "good"}, "{broken", {"prompt": None}])
    ended = call(tmp_path, *echo(rows), "--strict")
    assert ended.code == 4
    assert "2 of 3 rows are bad" in ended.err
    assert "line 2 of p.jsonl is not valid JSON" in ended.err
    assert 'line 3 of p.jsonl: the "prompt" column is null' in ended.err
    assert not list((tmp_path / "p").glob("generations*"))
    assert call(tmp_path, *echo(rows)).code == 3


def test_strict_with_good_rows_runs(tmp_path: Path, rows: Path) -> None:
    assert call(tmp_path, *echo(rows), "--strict").code == 0


def test_stderr_that_nobody_reads_does_not_end_a_run(tmp_path: Path, rows: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    ended = call(tmp_path, *echo(rows, "-o", "out"), before=lambda: os.dup2(write, 2) and None)
    os.close(write)
    assert (ended.code, ended.out) == (0, "out/generations.jsonl\n")


def test_python_looks_for_no_cycles_among_objects_that_end_with_it(tmp_path: Path, rows: Path) -> None:
    program = (
        "import atexit, gc, sys\n"
        "atexit.register(lambda: print('kept apart:', gc.get_freeze_count() > 0))\n"  # the last one registered is first
        "from batchgen.commands import main\n"
        "main(sys.argv[1:])\n"
    )
    words = [sys.executable, "-c", program, *map(str, echo(rows, "-o", "out"))]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "out/generations.jsonl\nkept apart: True\n")
