"""What a person at the terminal reads: once, and only what is so."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from batchgen.commands._runs import describe_failures
from batchgen.requests.output import renderer
from batchgen.types import MACHINE_ERRORS, Generation, RowError
from tests.commands.starts import call, echo, prompts, write_rows

ROOT = Path(__file__).parents[2]

BAD = "line 2 of p.jsonl has no prompt"


def failed(types: Sequence[str], path: Path, shape: Literal["openai", "vllm"], is_answers: bool) -> Path:
    """An errors file with a row of each type."""
    render = renderer("m", 0, shape, is_answers)
    rows = [RowError(type, BAD if type == "missing_prompt" else f"{type} here", 2) for type in types]
    path.write_bytes(b"".join(render(Generation(3, "r3", None, None, 0, 0, row, {})) for row in rows))
    return path


@pytest.mark.parametrize(
    ("shape", "is_answers"), [("openai", False), ("openai", True), ("vllm", True)], ids=["rows", "openai", "vllm"]
)
def test_a_failure_is_tried_again_only_where_another_start_may_succeed(
    shape: Literal["openai", "vllm"], is_answers: bool, tmp_path: Path
) -> None:
    path = tmp_path / "errors.jsonl"

    def said(*types: str) -> str:
        return describe_failures(failed(types, path, shape, is_answers))

    begin = f"what failed is in {path}, first: "
    mend = "The input itself is wrong there: mend these rows, and give them a run of their own"
    assert said("missing_prompt", "too_long") == f"{begin}{BAD}. {mend}"
    assert said("missing_prompt", "out_of_memory") == (
        f"{begin}{BAD}. The same command tries 1 of them again; the input is wrong in the others"
    )
    for type in MACHINE_ERRORS:
        assert said(type) == f"{begin}{type} here. The same command tries all of them again"


def test_the_engines_refuse_rows_with_types_that_are_known_to_be_theirs() -> None:
    found: set[Any] = set()
    for path in (ROOT / "batchgen").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Generation.failed":
                found.add(ast.literal_eval(node.args[1]))
    # What a row asks for cannot be carried out: another start does not help.
    assert found - set(MACHINE_ERRORS) == {"constraint", "no_token"}
    assert "out_of_memory" in found


def test_a_run_whose_rows_are_all_bad_does_not_promise_another_try(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", [*prompts(2), {"prompt": None}])
    ended = call(tmp_path, *echo(rows, "-o", "out"))
    assert ended.code == 3
    assert "first: line 3 of p.jsonl" in ended.err
    assert "The input itself is wrong there" in ended.err
    assert "same command" not in ended.err


def test_a_run_with_too_many_bad_rows_says_what_would_let_it_go_on(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", [{"prompt": None}, *prompts(5000)])
    ended = call(tmp_path, *echo(rows, "-o", "out"), "--max-error-rate", 0, "--batch-size", 50)
    assert ended.code == 75
    assert "The same command with a higher --max-error-rate goes on from there" in ended.err


def test_damage_in_the_run_folder_is_said_once_however_many_ranks_meet_it(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", prompts(40))
    assert call(tmp_path, *echo(rows, "-o", "out"), "--batch-size", 10).code == 0
    text = tmp_path / "out" / "generations-00001-00000.jsonl"
    text.write_bytes(text.read_bytes().replace(b'"text":"', b'"text":" ', 1)[:-1])
    ended = call(tmp_path, *echo(rows, "-o", "out"), "--ranks", 3)
    assert ended.code == 0
    said = [line for line in ended.err.splitlines() if "are open again" in line]
    assert said
    assert len(said) == len(set(said))
    assert {line.partition(":")[0] for line in said} == {"batchgen"}
