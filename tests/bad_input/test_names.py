"""Files and folders whose names are not UTF-8: every command prints them, and ends as with any other name."""

from __future__ import annotations

import io
import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.bad_input.command import call

ODD = os.fsdecode(b"\xff")
RUN = ["run", f"{ODD}.jsonl", "-o", ODD, "--engine", "echo"]


def _make_streams_strict(encoding: str = "utf-8") -> None:
    """As Python makes stdout where the locale is UTF-8 but not C.UTF-8; and stderr likewise."""
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding=encoding, errors="strict")


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_name_that_is_no_utf8_or_has_a_line_end_names_rows_all_the_same(format: str, tmp_path: Path) -> None:
    for name, shown in ((b"\xff.jsonl", r"\xff.jsonl"), (b"a\nb.jsonl", "a\nb.jsonl")):
        path = tmp_path / os.fsdecode(name)
        path.write_bytes(b'{"prompt":"one"}\n{\n')
        words = ["run", path.name, "--engine", "echo", "--output-format", format]
        ended = call(tmp_path, *words, before=_make_streams_strict)
        assert ended.code == 3, ended.err
        assert ended.out == f"{path.stem}/generations.{format}\n"
        (line,) = (tmp_path / path.stem / "errors.jsonl").read_bytes().splitlines()
        row = json.loads(line)
        assert row["id"] == f"{shown}:2"
        assert row["error"]["message"].startswith(f"line 2 of {shown} is not valid JSON")


@pytest.mark.slow
def test_every_command_prints_names_that_are_no_utf8(tmp_path: Path) -> None:
    (tmp_path / f"{ODD}.jsonl").write_bytes(b'{"id":"a","prompt":"one"}\n{"id":"b","prompt":"two"}\n')
    (tmp_path / "requests.jsonl").write_text(
        '{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"m","prompt":"one"}}\n'
    )
    bench = ["bench", "-o", f"{ODD}b", "--engines", "echo", "--batch-sizes", 1, "--cycles", 1, "--tokens", 1]
    answers = ["run-batch", "-i", "requests.jsonl", "-o", f"{ODD}.out", "--engine", "echo", "--served-model-name", "m"]
    for words, code, out, err in (
        (RUN, 0, f"{ODD}/generations.jsonl\n", "finished; 2 of 2 rows good"),
        (["merge", ODD], 0, f"{ODD}/generations.jsonl\n", ""),
        (["report", ODD], 0, f"{ODD}/report.html\n", f"plots in {ODD}/report-plots"),
        (["status", ODD], 0, f"{ODD}: finished\n", ""),
        (["status", ODD, "--json"], 0, r'"folder": "\udcff"', ""),
        (["run", f"{ODD}x.jsonl", *RUN[2:]], 4, "", f"there is no file {ODD}x.jsonl\n"),
        ([*RUN, ODD], 4, "", f"{ODD} is a folder, but not one that datasets saved"),
        ([*RUN, f"--{ODD}"], 2, "", "No such option"),
        (["merge", f"{ODD}.jsonl"], 4, "", f"{ODD}.jsonl"),
        (["cancel", f"{ODD}.jsonl"], 4, "", f"there is no run folder {ODD}.jsonl\n"),
        (answers, 0, f"{ODD}.out\n", "finished; 1 of 1 rows good"),
        (["submit", "--print", "--", *RUN], 0, f"-o '{ODD}' --engine echo\n", ""),
        (["plan", f"{ODD}.jsonl", "--model", "llama-8b"], 0, f"batchgen run '{ODD}.jsonl' --model", ""),
        ([*bench, "--input", f"{ODD}.jsonl"], 0, f"{ODD}b/tables.md\n", ""),
        (["bench", "show", f"{ODD}b"], 0, r"\udcff.jsonl", ""),
        (["bench", "compare", f"{ODD}b", f"{ODD}b"], 0, f"{ODD}.jsonl", ""),
        (["split", ODD, "x", "--tp", 2], 4, "", ODD),
    ):
        ended = call(tmp_path, *words, before=_make_streams_strict)
        assert ended.code == code, (words, ended)
        assert out in ended.out, (words, ended)
        assert err in ended.err, (words, ended)
        assert "Traceback" not in ended.err
    names = ("tables.md", "results.csv")
    assert all(r"\udcff.jsonl" in (tmp_path / f"{ODD}b" / name).read_text("utf-8") for name in names)


@pytest.mark.parametrize(("encoding", "printed"), [("latin-1", b"f\xfcr \\u65e5"), ("ascii", "für 日".encode())])
def test_a_prompt_that_the_encoding_of_stdout_does_not_hold_is_printed(
    encoding: str, printed: bytes, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt":"für 日"}\n', "utf-8")
    before = partial(_make_streams_strict, encoding)
    ended = call(tmp_path, "run", "a.jsonl", "--engine", "echo", "--dry-run", before=before)
    assert ended.code == 0, ended
    assert ended.out.endswith(f"\n{os.fsdecode(printed)}\n")
