"""What a run says of itself at its end, and `status` after it: texts that were cut, tokens of thinking."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchgen import Host, Recipe, RunSettings, SamplingParams, Status, checkpoint, run
from batchgen.checkpoint import RunFolder
from batchgen.commands._runs import conclude
from batchgen.types import Batch, Constraint, Details, Generation, Prompt
from tests.checkpoint.folders import commit, generation, made
from tests.commands.starts import ENVIRONMENT, call, write_rows

LETTERS = SamplingParams(max_new_tokens=3, constraint=Constraint("regex", "[a-z]*"))


def said(status: Status, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        conclude(status, reports_outcome=True)
    assert ended.value.code == 0
    return capsys.readouterr().err


@pytest.mark.parametrize(("texts", "sentence"), [(["abcd", "ab"], "1 row was cut"), (["abcd"] * 3, "3 rows were cut")])
def test_rows_cut_before_their_constraint_is_met_are_counted(
    texts: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
    settings = RunSettings(engine="echo", recipe=Recipe(sampling=LETTERS))
    status = run(str(path), tmp_path / "out", settings, host=Host(ENVIRONMENT))
    assert status.incomplete == sum(len(text) > 3 for text in texts)
    words = "before the text was all that its constraint demands"
    assert f'{sentence} {words} (finish_reason "length")' in said(status, capsys)
    assert f"cut     {status.incomplete} rows, {words[:6]}" in call(tmp_path, "status", "out").out
    assert json.loads(call(tmp_path, "status", "out", "--json").out)["incomplete"] == status.incomplete


def test_a_run_without_constraints_says_nothing_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "abcd"}])
    settings = RunSettings(engine="echo", recipe=Recipe(sampling=SamplingParams(max_new_tokens=3)))
    status = run(str(path), tmp_path / "out", settings, host=Host(ENVIRONMENT))
    assert (status.incomplete, "cut" in said(status, capsys)) == (0, False)


def test_a_row_is_counted_once_and_by_the_record_that_counts(tmp_path: Path) -> None:
    folder = made(tmp_path, 4)
    rows = [generation(row) for row in range(3)]
    commit(folder, 1, 0, Batch([generation(0, failed=True)]), Batch(rows[:2], incomplete=[1]))
    commit(folder, 2, 0, Batch(rows[1:], incomplete=[1, 2]))
    assert checkpoint.status(folder).incomplete == 2


def test_tokens_of_thinking_are_counted_over_all_samples(tmp_path: Path) -> None:
    prompt = Prompt(0, "a", 1, "", [1], SamplingParams(), {})

    def sample(reasoning: int | None, *others: Generation) -> Generation:
        one = Generation.of(prompt, "x", "stop", 9, None, Details(reasoning_tokens=reasoning))
        one.others = others
        return one

    folder = made(tmp_path, 1)
    commit(folder, 1, 0, Batch([sample(4, sample(3), sample(None))]))
    assert checkpoint.status(RunFolder(folder.path)).reasoning_tokens == 7
    assert "thought 7 of the generated tokens" in call(tmp_path, "status", folder.path).out
