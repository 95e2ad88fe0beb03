"""The README says what is there: its tree, its commands, its Python, its links and tables."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from batchgen import engines

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def test_the_tree_is_the_real_one() -> None:
    (tree,) = [block for block in blocks("") if block.startswith("batchgen/\n")]
    shown = {line.split()[1] for line in tree.splitlines() if line.startswith(("├", "└"))}
    package = ROOT / "batchgen"
    there = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in package.iterdir()
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
    }
    assert shown == there
    for line in tree.splitlines():
        if not line.startswith(("├", "└")):
            assert (ROOT / line.split()[0]).is_dir(), line


def test_the_scripts_are_the_real_ones() -> None:
    (line,) = [line for line in README.splitlines() if line.startswith("scripts/  ")]
    assert set(line.partition(": ")[2].split(", ")) == {path.name for path in (ROOT / "scripts").iterdir()}


def test_every_engine_is_in_the_table_with_its_settings() -> None:
    for name in engines.names():
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
        settings = re.findall(r"`(\w+)`", row.rpartition("|")[0].rpartition("|")[2])
        assert settings == list(engines.settings_of(engines.find(name).Options())), name


@pytest.mark.slow
def test_the_commands_run_as_they_stand(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = [line for block in blocks("sh") for line in block.splitlines() if line]
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command, comments=True)
        assert words.pop(0) == "batchgen"
        done = subprocess.run([sys.executable, "-m", "batchgen", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout
    generations = (tmp_path / "out/first/generations.jsonl").read_text(encoding="utf-8")
    assert "Paris" in generations
    assert "Paris" in (tmp_path / "out/answers.jsonl").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_python_runs_as_it_stands(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (code,) = blocks("python")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:] == ["0", "0"]


def test_links_lead_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                path, _, anchor = target.partition("#")
                linked = document.parent / path if path else document
                assert linked.exists(), (document.name, target)
                headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
                slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert not anchor or anchor in slugs, (document.name, target)


def test_the_threat_table_names_tests_that_are_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    for path in re.findall(r"`(tests/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    sources = {
        "S": (ROOT / "tests/test_security.py").read_text(encoding="utf-8"),
        "M": (ROOT / "tests/engines/test_hostile_models.py").read_text(encoding="utf-8"),
    }
    named = 0
    for row in (line for line in text.splitlines() if line.startswith("| ")):
        for letter, names in re.findall(r"\b([SM]) ((?:`\w+…`(?:, )?)+)", row):
            for name in re.findall(r"`(\w+)…`", names):
                assert f"def test_{name}" in sources[letter], name
                named += 1
    assert named > 15
