"""The README: it is short, and what it shows runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pages import README, ROOT, blocks, run_python, run_shell, text_of


def test_it_is_read_in_five_minutes() -> None:
    assert len(text_of(README).splitlines()) <= 150


def test_it_leads_to_every_page_of_the_manual() -> None:
    missing = [page.name for page in ROOT.glob("docs/*.md") if f"(docs/{page.name})" not in text_of(README)]
    assert not [name for name in missing if name not in ("index.md", "renamed-modules.md")]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # three commands with a model, beside other work
def test_the_commands_run_as_they_stand(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = [line for block in blocks(README, "sh") for line in block.splitlines() if line]
    assert len(commands) >= 4
    for command in commands:
        done = run_shell(command, tmp_path)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout
    generations = (tmp_path / "out/first/generations.jsonl").read_text(encoding="utf-8")
    assert "Paris" in generations
    assert "Paris" in (tmp_path / "out/answers.jsonl").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_python_runs_as_it_stands(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (code,) = blocks(README, "python")
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:] == ["0", "0"]
