"""`batchgen run`: what could not run is exit 4 and a sentence, and leaves the run folder as it was."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from tests.commands.starts import call, echo, prompts, write_rows


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", prompts(20))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["missing.jsonl"], "there is no file missing.jsonl"),
        (["nothing-*.jsonl"], "no file matches nothing-*.jsonl"),
        (["notes.txt"], "notes.txt is of no known format"),
        (["prompts.jsonl", "prompts.jsonl"], "named twice"),
        (["prompts.jsonl", "--set", "speed=3"], "engine echo has no setting 'speed'. Its settings: seconds"),
        (["prompts.jsonl", "--kv-dtype", "fp8"], "engine echo has no setting 'kv_dtype'. Its settings: seconds"),
        (["prompts.jsonl", "--set", "seconds=soon"], "--set seconds=soon: must be float"),
        (["prompts.jsonl", "--set", "seconds=nan"], "--set seconds must be a number, 0 or more"),
        (["prompts.jsonl", "--set", "seconds"], "--set takes name=value, not 'seconds'"),
        (["prompts.jsonl", "--template", "{{ open"], "--template is no Jinja template"),
        (["prompts.jsonl", "--template", "x", "--prompt-column", "y"], "exclude each other"),
        (["prompts.jsonl", "--max-new-tokens", "0"], "max_new_tokens must be a whole number, 1 or more"),
        (["prompts.jsonl", "--top-p", "2"], "top_p must be a number above 0 and at most 1"),
        (["prompts.jsonl", "--repetition-penalty", "0"], "repetition_penalty must be a number from 0.01 to 100"),
        (["prompts.jsonl", "--min-tokens", "129"], "min_tokens must be at most 128, as many as may be generated"),
        (["prompts.jsonl", "--regex", "a(?=b)"], "--regex: the regular expression cannot be enforced: look-around"),
        (["prompts.jsonl", "--regex", "a", "--choice", "b"], "--regex and --choice both say what the text must be"),
        (["prompts.jsonl", "--json-schema", "notes.txt"], "--json-schema notes.txt is no JSON: Expecting value"),
        (
            ["prompts.jsonl", "--json-schema", "schema.json"],
            "--json-schema schema.json: the schema uses uniqueItems, which cannot be enforced; leave it out",
        ),
        (["prompts.jsonl", "--grammar", "notes.txt"], "--grammar notes.txt: the grammar cannot be enforced: Failed to"),
        (["prompts.jsonl", "-o", "notes.txt"], "notes.txt is a file, not a folder. Choose another folder with -o"),
        (
            ["prompts.jsonl", "-o", "notes.txt/below"],
            "notes.txt is a file, not a folder. Choose another folder with -o",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_run_is_exit_4_and_a_sentence(
    tmp_path: Path, rows: Path, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "notes.txt").write_text("no prompts")
    (tmp_path / "schema.json").write_text('{"uniqueItems": true}')
    ended = call(tmp_path, *echo(*arguments))
    assert (ended.code, ended.out) == (4, "")
    assert ended.err.startswith("Error: ")
    assert sentence in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["prompts.jsonl", "--engine", "none"],
        ["prompts.jsonl", "--batch-size", "0"],
        ["prompts.jsonl", "--nope"],
        ["prompts.jsonl", "--samples", "0"],
        ["prompts.jsonl", "--json-schema", "missing.json"],
    ],
    ids=" ".join,
)
def test_usage_errors_keep_the_exit_code_of_click(tmp_path: Path, rows: Path, arguments: list[str]) -> None:
    ended = call(tmp_path, "run", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert "Usage: " in ended.err


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        (["--max-new-tokens", "3"], "sampling.max_new_tokens was 128, now 3"),
        (["--stop", "x"], 'sampling.stop was [], now ["x"]'),
        (["--template", "{{ prompt }}"], 'template was null, now "{{ prompt }}"'),
    ],
    ids=["max-new-tokens", "stop", "template"],
)
def test_another_run_in_the_folder_is_refused_with_the_fields(
    tmp_path: Path, rows: Path, changed: list[str], field: str
) -> None:
    assert call(tmp_path, *echo(rows, "-o", "out")).code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json*")}
    ended = call(tmp_path, *echo(rows, "-o", "out"), *changed)
    assert ended.code == 4
    assert field in ended.err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json*")} == before


def test_changed_input_is_refused_and_the_same_content_elsewhere_is_not(tmp_path: Path, rows: Path) -> None:
    assert call(tmp_path, *echo(rows, "-o", "out")).code == 0
    moved = rows.rename(tmp_path / "moved.jsonl")
    assert call(tmp_path, *echo(moved, "-o", "out")).code == 0
    write_rows(moved, [*prompts(19), {"id": "row-19", "prompt": "other"}])
    ended = call(tmp_path, *echo(moved, "-o", "out"))
    assert ended.code == 4
    assert "is not what the run began with" in ended.err


def test_folder_without_write_permission_is_exit_4(tmp_path: Path, rows: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    ended = call(tmp_path, *echo(rows, "-o", "closed/out"), before=obey_permissions)
    assert ended.code == 4, ended.err
    assert "cannot write the run folder closed/out: Permission denied" in ended.err
    assert call(tmp_path, *echo(rows, "-o", "closed"), before=obey_permissions).code == 4


def obey_permissions() -> None:
    """Permission bits do not bind root, unless it is without CAP_DAC_OVERRIDE (1). See capabilities(7)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP; refused where it is not needed


def test_model_that_is_none_is_exit_4(tmp_path: Path, rows: Path) -> None:
    (tmp_path / "model").mkdir()
    ended = call(tmp_path, "run", rows, "--model", "model", environment={"PYTHONWARNINGS": ""})
    assert ended.code == 4, ended.err
    assert "model is not a model folder: it holds no config.json" in ended.err
    assert "Traceback" not in ended.err
