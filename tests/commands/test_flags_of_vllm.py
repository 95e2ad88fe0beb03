"""Flags of `vllm run-batch` with one dash and several characters, which hold the letters of our -i and -o."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchgen.commands import run_batch
from tests.commands.starts import call, read_rows, write_rows


@pytest.mark.parametrize(
    ("words", "ignored"),
    [
        (["-iin", "-oout", "-cc.mode=3"], ["-cc.mode=3"]),
        (["-O3", "-i", "in", "-O.mode=3", "-o", "out"], ["-O3", "-O.mode=3"]),
        (["-i", "in", "--other", "-tp", "4", "-cc.pass_config", "5", "-o", "out"], ["--other", "-tp", "4"]),
        (["-i", "in", "-O", "3", "-o", "out"], ["-O", "3"]),
    ],
)
def test_they_are_left_alone(words: list[str], ignored: list[str]) -> None:
    context = run_batch.command.make_context("run-batch", words)
    assert (context.params["input_file"], context.params["output_file"]) == ("in", "out")
    assert context.args[: len(ignored)] == ignored
    assert "".join(context.args).isprintable()


def test_a_value_may_look_like_one() -> None:
    words = ["-i", "-cc.mode", "-o", "-i", "--stop", "-O3", "--seed", "-12", "-O4"]
    context = run_batch.command.make_context("run-batch", words)
    assert (context.params["input_file"], context.params["output_file"]) == ("-cc.mode", "-i")
    assert (context.params["stop"], context.params["seed"]) == (("-O3",), -12)
    assert context.args == ["-O4"]


def test_answers_go_where_they_shall(tmp_path: Path) -> None:
    body = {"prompt": "x", "model": "m"}
    write_rows(tmp_path / "in.jsonl", [{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}])
    words = ["-i", "in.jsonl", "-o", "out.jsonl", "-cc.mode=3", "-O3", "--model", "m", "--engine", "echo"]
    ended = call(tmp_path, "run-batch", *words)
    assert (ended.code, ended.out) == (0, "out.jsonl\n"), ended.err
    assert "batchgen: ignored, not known here: -cc.mode=3 -O3\n" in ended.err
    assert [line["custom_id"] for line in read_rows(tmp_path / "out.jsonl")] == ["a"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.jsonl", "out.jsonl", "out.jsonl.run"]
