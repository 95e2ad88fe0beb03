"""The manual says what is there: its commands run, its tables and lists are whole, its links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import batchgen
from batchgen import engines
from batchgen.commands import _vllm_flag_names, _vllm_flags, main
from tests.commands.starts import read_rows
from tests.pages import PAGES, README, ROOT, blocks, loads_a_model, run_python, run_shell, text_of

DOCS = sorted(ROOT.glob("docs/*.md"))
COMMANDS = [page for page in DOCS if blocks(page, "sh")]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def page_called(name: str) -> str:
    return text_of(ROOT / "docs" / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the commands of a page are run."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The capital of France is", "max_new_tokens": 4}\n')
    return tmp_path


def run_page(page: Path, folder: Path) -> None:
    results = [run_shell(block, folder) for block in blocks(page, "sh")]
    assert not [(done.args[-1], done.stderr) for done in results if done.returncode]
    assert any(done.stdout for done in results)


@pytest.mark.parametrize("page", [page for page in COMMANDS if not loads_a_model(page)], ids=named)
def test_commands_without_a_model_run_as_they_stand(page: Path, folder: Path) -> None:
    run_page(page, folder)
    if page.name == "bad-input.md":
        assert '"two"' in (folder / "again.jsonl").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # five commands with a model, beside other work
@pytest.mark.parametrize("page", [page for page in COMMANDS if loads_a_model(page)], ids=named)
def test_commands_with_a_model_run_as_they_stand(page: Path, smollm2: Path, folder: Path) -> None:
    run_page(page, folder)
    if page.name == "parameters.md":
        check_asks({row["id"]: row for row in read_rows(folder / "out" / "asks" / "generations.jsonl")}, page)


def check_asks(rows: dict[str, dict[str, Any]], page: Path) -> None:
    """Whether each row of the example is what it asks for, and what the page shows of it that no rounding changes."""
    assert list(json.loads(rows["schema"]["text"])) == ["age"]
    assert rows["choice"]["text"] in ("yes", "no")
    assert re.fullmatch(r" (18|19|20)[0-9]{2}", rows["regex"]["text"])
    assert len(rows["samples"]["texts"]) == 3
    assert "Paris" not in rows["without"]["text"]
    assert len(rows["alternatives"]["top_logprobs"][0]) == 2
    shown = {row["id"]: row for row in map(json.loads, blocks(page, "json")[0].splitlines())}
    assert shown.keys() == rows.keys()
    assert shown["refused"]["error"] == rows["refused"]["error"]


def test_the_run_folder_can_be_read_as_its_page_says(folder: Path) -> None:
    (code,) = blocks(ROOT / "docs" / "run-folder.md", "python")
    run_shell("batchgen run examples/prompts.jsonl -o out/echo --engine echo", folder)
    done = run_python(code, folder)
    assert done.stdout == "24 rows are done\n", done.stderr


def test_the_python_of_the_api_runs_as_it_stands(folder: Path) -> None:
    (code,) = blocks(ROOT / "docs" / "api.md", "python")
    done = run_python(code, folder)
    assert done.stdout == "finished 24 0 0\n", done.stderr


@pytest.mark.slow
def test_the_python_for_users_of_vllm_runs_as_it_stands(smollm2: Path, folder: Path) -> None:
    (code,) = blocks(ROOT / "docs" / "coming-from.md", "python")
    done = run_python(code, folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "generations.jsonl").exists()


_BEFORE_THE_WORDS = re.compile(r".*\sbatchgen(\.sif)? (?=(run|run-batch|submit) )")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=named)
def test_commands_that_need_more_than_this_machine_are_read(page: Path) -> None:
    for line in (line for block in blocks(page, "bash") for line in block.splitlines() if line):
        words = shlex.split(line, comments=True)
        if words[0] == "batchgen":
            check_words(words[1:])
        elif _BEFORE_THE_WORDS.match(line):
            check_words(shlex.split(_BEFORE_THE_WORDS.sub("", line), comments=True))
        else:
            script = next((word for word in words if word.startswith("scripts/")), None)
            assert script is None or (ROOT / script).exists(), line
            assert script or words[0] in ("source", "apptainer", "docker", "vllm"), line


def check_words(words: list[str]) -> None:
    """Whether the command line would be understood: its command, its options and their values."""
    own, _, inner = " ".join(words).partition(" -- ")
    command = main.get_command(click.Context(main), words[0])
    assert command is not None, words
    arguments = shlex.split(own)[1:]
    if words[0] == "submit":
        command.make_context("submit", [*arguments, "--", *shlex.split(inner)], **main.context_settings)
        check_words(shlex.split(inner))
        return
    if isinstance(command, click.Group) and arguments and arguments[0] in command.commands:
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context(words[0], arguments, resilient_parsing=False, **main.context_settings)


def test_links_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *PAGES):
        for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
            if not target.startswith(("http://", "https://")):
                path, _, anchor = target.partition("#")
                linked = page.parent / path if path else page
                assert linked.exists(), (page.name, target)
                headings = re.findall(r"^#+ (.*)$", text_of(linked), re.MULTILINE) if anchor else []
                slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert not anchor or anchor in slugs, (page.name, target)


def test_every_page_is_in_the_site_s_contents() -> None:
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = re.findall(r"[\w/-]+\.md", contents)
    assert len(listed) == len(set(listed))
    assert {page.name for page in DOCS} <= set(listed)


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    """The pages that are made from the program, by a process of its own: Click makes a command's --help once."""
    code = "import generate, json; print(json.dumps(generate.pages()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "docs", env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    pages: dict[str, str] = json.loads(done.stdout)
    return pages


@pytest.mark.parametrize("name", ["cli.md", "modules.md"])
def test_generated_pages_are_current(name: str, generated: dict[str, str]) -> None:
    assert page_called(name) == generated[name], "scripts/docs --write writes it again"


def test_every_command_and_option_is_in_the_command_line_reference() -> None:
    page = page_called("cli.md")
    for name in main.list_commands(click.Context(main)):
        command = main.get_command(click.Context(main), name)
        assert command is not None
        section = page.partition(f"\n## batchgen {name}\n")[2].partition("\n## ")[0]
        options = [option for option in command.params if isinstance(option, click.Option) and not option.hidden]
        assert not [option.opts for option in options if option.opts[0] not in section], name


def test_every_engine_is_in_the_table_with_its_settings() -> None:
    page = page_called("engines.md")
    explained = {name for row in page.splitlines() if row.startswith("| `") for name in first_cell(row)}
    for name in engines.names():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        settings = re.findall(r"`(\w+)`", row.rpartition("|")[0].rpartition("|")[2])
        assert settings == list(engines.settings_of(engines.find(name).Options())), name
        assert set(settings) <= explained, name


def first_cell(row: str) -> list[str]:
    return re.findall(r"`([\w.-]+)`", row.split("|")[1])


@pytest.mark.parametrize("kind", [batchgen.Recipe, batchgen.SamplingParams, batchgen.Status], ids=lambda k: k.__name__)
def test_every_field_is_explained_in_the_api_reference(kind: type) -> None:
    section = page_called("api.md").partition(f"::: batchgen.{kind.__name__}\n")[2].partition("\n::: ")[0]
    rows = [name for line in section.splitlines() if line.startswith("| `") for name in first_cell(line)]
    assert dataclasses.is_dataclass(kind)
    assert rows == [field.name for field in dataclasses.fields(kind)]


def test_everything_that_is_exported_is_in_the_api_reference() -> None:
    page = page_called("api.md")
    assert not [name for name in batchgen.__all__ if f"| `{name}` | " not in page]
    assert set(re.findall(r"^::: batchgen\.(\w+)", page, re.MULTILINE)) <= set(batchgen.__all__)


def test_the_tree_is_the_real_one() -> None:
    (tree,) = [block for block in blocks(ROOT / "docs" / "architecture.md", "text") if block.startswith("batchgen/\n")]
    shown = {line.split()[1] for line in tree.splitlines()[1:]}
    package = ROOT / "batchgen"
    there = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in package.iterdir()
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
    }
    assert shown == there


def test_the_architecture_names_modules_that_are_there() -> None:
    text = page_called("architecture.md")
    paths = {path for path in re.findall(r"`([a-z_]+/[\w/]*(?:\.py)?)`", text) if "NAME" not in path}
    assert len(paths) > 25
    places = (ROOT / "batchgen", ROOT)
    assert not [path for path in paths if not any((place / path).exists() for place in places)]


def test_renamed_modules_are_there() -> None:
    rows = [line.split("|") for line in page_called("renamed-modules.md").splitlines() if line.startswith("| `")]
    modules = [re.findall(r"`([\w.]+)`", row[2])[0] for row in rows]
    assert len(modules) > 80
    paths = [ROOT / "batchgen" / name.replace(".", "/") for name in modules]
    assert not [str(path) for path in paths if not (path.is_dir() or path.with_suffix(".py").exists())]


def test_a_format_is_added_by_the_manual_alone(folder: Path) -> None:
    (code,) = [block for block in blocks(ROOT / "docs" / "architecture.md", "python") if "(Source)" in block]
    (folder / "more").mkdir()
    (folder / "more" / "csv.py").write_text(code)
    (folder / "words.csv").write_text('id,prompt\na,"one, two"\nb\nc,three\n')
    done = run_python(with_more("formats", "run words.csv -o out --engine echo"), folder)
    assert done.returncode == 3, done.stderr
    rows = (folder / "out" / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    assert '"text":"one, two"' in rows[0]
    assert "line 2 of words.csv has not as many values" in rows[1]
    assert '"text":"three"' in rows[2]


@pytest.mark.slow
def test_an_engine_is_added_by_the_manual_alone(tiny_llama: Path, folder: Path) -> None:
    (code,) = [block for block in blocks(ROOT / "docs" / "architecture.md", "python") if "(Engine)" in block]
    (folder / "more").mkdir()
    (folder / "more" / "shout.py").write_text(code)
    asks: list[dict[str, object]] = [
        {},
        {"max_new_tokens": 2},
        {"stop": "CAPITAL"},
        {"choice": ["yes", "no"]},
        {"temperature": 1},
    ]
    rows = [{"prompt": "The capital of France is", **ask} for ask in asks]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = f"run prompts.jsonl -o out --engine shout --set marks=3 --model {shlex.quote(str(tiny_llama))}"
    done = run_python(with_more("engines", line), folder)
    assert done.returncode == 3, done.stderr
    whole, cut, stopped, *refused = read_rows(folder / "out" / "generations.jsonl")
    assert (whole["text"], whole["finish_reason"]) == ("THE CAPITAL OF FRANCE IS!!!", "stop")
    assert (cut["generated_tokens"], cut["finish_reason"]) == (2, "length")
    assert (stopped["text"], stopped["finish_reason"]) == ("THE ", "stop")
    assert [row["error"]["type"] for row in refused] == ["engine", "engine"]
    assert "line 4: shout has no probabilities" in refused[0]["error"]["message"]


def with_more(room: str, line: str) -> str:
    """Code that calls batchgen with the modules of the folder `more` in a room of the package."""
    return (
        f"import batchgen.{room} as room\nroom.__path__.append('more')\n"
        f"from batchgen.commands import main\nmain({shlex.split(line)!r})"
    )


def test_flags_of_vllm_are_what_the_page_says() -> None:
    table = page_called("coming-from.md").partition("| flag of vLLM | here |\n")[2].partition("\n\n")[0]
    command = main.get_command(click.Context(main), "run-batch")
    assert command is not None
    own = {name for option in command.params for name in option.opts} | {_vllm_flags.MODULES}
    counted = 0
    for row in table.splitlines()[1:]:
        flags, here = row.strip("| ").split(" | ", 1)
        known = (
            _vllm_flag_names.IGNORED
            if "ignored" in here
            else set(_vllm_flag_names.INSTEAD)
            if "refused" in here
            else own
        )
        for flag in re.findall(r"`(--[\w-]+)`", flags):
            assert flag in known, (flag, here)
            counted += 1
    assert counted > 25


def test_messages_in_troubleshooting_are_those_of_the_program() -> None:
    said = "\n".join(sentences())
    page = page_called("troubleshooting.md")
    messages = [match for match in re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) if " " in match]
    assert len(messages) > 30
    for message in messages:
        for part in (part.strip() for part in message.split("…")):
            assert len(part) < 6 or part in said, (message, part)


def sentences() -> Iterator[str]:
    """Every text in the program, with … for what is put into it."""
    for path in (ROOT / "batchgen").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                yield "".join(map(str, parts))


def test_scripts_are_listed_in_contributing() -> None:
    page = text_of(ROOT / "CONTRIBUTING.md")
    assert not [path.name for path in (ROOT / "scripts").iterdir() if f"`scripts/{path.name}" not in page]


def test_recipes_of_containers_copy_what_is_there() -> None:
    definition, dockerfile = ((ROOT / "containers" / name).read_text() for name in ("batchgen.def", "Dockerfile"))
    listed = re.findall(r"^    (\S+) /usr/local/batchgen/\S+$", definition, re.MULTILINE)
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE) for name in line.split()]
    assert sorted(listed) == sorted(copied)
    assert not [name for name in listed if not (ROOT / name).exists()]


def test_the_threat_table_names_tests_that_are_there() -> None:
    text = page_called("security.md")
    for path in re.findall(r"`(tests/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    sources = {
        "S": (ROOT / "tests/test_security.py").read_text(encoding="utf-8"),
        "M": (ROOT / "tests/engines/test_hostile_models.py").read_text(encoding="utf-8"),
    }
    counted = 0
    for row in (line for line in text.splitlines() if line.startswith("| ")):
        for letter, names in re.findall(r"\b([SM]) ((?:`\w+…`(?:, )?)+)", row):
            for name in re.findall(r"`(\w+)…`", names):
                assert f"def test_{name}" in sources[letter], name
                counted += 1
    assert counted > 15


def test_the_claim_of_speed_is_what_was_measured() -> None:
    """Every row of the README's table stands in the table of measurements, and no row of that is left out."""
    figures = text_of(ROOT / "benchmarks" / "README.md")
    section = figures.partition("## Beside vLLM on one H200")[2].partition("\n## ")[0]
    measured = [row.rstrip("| ").rpartition("| ")[2].strip("*") for row in section.splitlines() if row.startswith("| ")]
    table = text_of(README).partition("| workload | speed of batchgen / vLLM |")[2].partition("\n\n")[0]
    claimed = re.findall(r"\d\.\d\d", "".join(row.rpartition(" | ")[2] for row in table.splitlines()))
    assert sorted(claimed) == sorted(value for value in measured if re.fullmatch(r"\d\.\d\d", value))
