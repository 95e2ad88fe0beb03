"""The package as a whole: its metadata, pins, scripts, and the rules of size and layout that no linter knows."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "batchgen"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(path for path in [*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"] if path.is_file())
HEAVY = {"accelerate", "bitsandbytes", "datasets", "deepspeed", "pyarrow", "torch", "transformers"}
# Not the project's own text.
SKIPPED = {".git", ".venv", ".venv-docs", ".hypothesis", "build", "dist", "out", "prompts", "site"}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def requirements(section: str, option: str) -> dict[str, Requirement]:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    found = [Requirement(line) for line in settings[section][option].splitlines() if line]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def pins(*locks: str) -> dict[str, str]:
    lines = [line for lock in locks for line in (ROOT / lock).read_text(encoding="utf-8").splitlines()]
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


RUNTIME = requirements("options", "install_requires")
TEST = requirements("options.extras_require", "test")
DOCS = requirements("options.extras_require", "docs")


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_script_is_executable_and_parses(script: Path) -> None:
    assert os.access(script, os.X_OK)
    first = script.read_text(encoding="utf-8").splitlines()[0]
    if "python" in first:
        compile(script.read_text(encoding="utf-8"), named(script), "exec")
    else:
        assert first == "#!/usr/bin/env bash"
        assert "set -euo pipefail" in script.read_text(encoding="utf-8")
        subprocess.run(["bash", "-n", script], check=True)


def test_install_names_its_usage_when_asked_for_something_else() -> None:
    result = subprocess.run([ROOT / "scripts" / "install", "tset"], capture_output=True, text=True, cwd="/")
    assert result.returncode == 4
    assert "usage: scripts/install [test | docs]" in result.stderr


def test_install_refuses_an_interpreter_that_is_no_python(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path)
    result = subprocess.run(
        [tree / "scripts" / "install"], capture_output=True, text=True, env={**os.environ, "PYTHON": "/bin/false"}
    )
    assert result.returncode == 4
    assert "PYTHON=/bin/false is not Python 3.11 or newer" in result.stderr
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize("name", sorted(RUNTIME | TEST | DOCS))
def test_dependency_is_argued_for_in_contributing(name: str) -> None:
    assert f"\n| {name} | " in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("wanted", "locks"),
    [
        (RUNTIME, ["requirements.lock"]),
        (TEST, ["requirements.lock", "requirements-test.lock"]),
        (DOCS, ["requirements-docs.lock"]),
    ],
    ids=["runtime", "test", "docs"],
)
def test_lock_pins_every_dependency_within_its_range(wanted: dict[str, Requirement], locks: list[str]) -> None:
    pinned = pins(*locks)
    assert wanted.keys() <= pinned.keys()
    wrong = [str(wish) for name, wish in wanted.items() if not wish.specifier.contains(pinned[name])]
    assert not wrong


def test_locks_do_not_overlap() -> None:
    assert pins("requirements.lock").keys().isdisjoint(pins("requirements-test.lock"))


def test_the_lock_of_the_manual_agrees_with_the_others() -> None:
    others = pins("requirements.lock", "requirements-test.lock")
    manual = pins("requirements-docs.lock")
    assert not [name for name in manual.keys() & others.keys() if manual[name] != others[name]]


def test_lock_pins_all_that_its_packages_need() -> None:
    pinned = pins("requirements.lock", "requirements-test.lock")
    missing = {
        f"{name} needs {need}"
        for name in pinned
        if name != "torch"  # what a CUDA build brings along is pinned by torch
        for need in needs(name)
        if need not in pinned
    }
    assert not missing


def needs(name: str) -> Iterator[str]:
    """What the installed package `name` needs here, extras left out."""
    try:
        found = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, found):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name)


def test_installed_packages_fit_together() -> None:
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


def test_package_imports_only_what_it_declares() -> None:
    undeclared = {
        f"{named(path)} imports {name}"
        for path in MODULES
        for name in imports(path)
        if name not in sys.stdlib_module_names and name not in ("batchgen", "__future__")
        # A torch for GPUs brings the triton that fits it; package humming-kernels of the extra is called humming.
        if canonicalize_name(name) not in {*RUNTIME, "triton", "humming"}
    }
    assert not undeclared


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["run", "--help"], ["status", "--help"]], ids=" ".join
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "batchgen", *arguments], capture_output=True, text=True
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert result.returncode == 0, result.stderr
    assert "click" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_wheel_holds_the_package_its_types_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path / "wheel"), str(copy_of_the_tree(tmp_path))], check=True)
    [wheel] = (tmp_path / "wheel").iterdir()
    with zipfile.ZipFile(wheel) as content:
        held = set(content.namelist())
        metadata = {name.rpartition("/")[2]: name for name in held if ".dist-info/" in name}
        entry_points = content.read(metadata["entry_points.txt"]).decode()
    data = {"batchgen/py.typed", *(f"batchgen/report/page.{ending}" for ending in ("html", "css", "js"))}
    assert {named(path) for path in MODULES} | data == held - set(metadata.values())
    assert "batchgen = batchgen.commands:main" in entry_points
    assert "LICENSE" in metadata


def copy_of_the_tree(folder: Path) -> Path:
    """The tree without what is built in it, so that a build leaves nothing behind here."""
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*SKIPPED, ".*_cache", "*.egg-info", "__pycache__"))
    return tree


@pytest.mark.parametrize(
    ("folder", "contract", "others"),
    [("engines", "Engine", {"__init__"}), ("formats", "Source", {"__init__", "input"})],
)
def test_folder_holds_one_implementation_a_file_and_nothing_else(folder: str, contract: str, others: set[str]) -> None:
    modules = {path.stem: path for path in (PACKAGE / folder).glob("[!_]*.py")}
    modules |= {path.parent.name: path for path in (PACKAGE / folder).glob("*/engine.py")}
    modules = {name: path for name, path in modules.items() if name not in others}
    assert len(modules) >= 4
    assert {name: implementations(path, contract) for name, path in modules.items()} == dict.fromkeys(modules, 1)


def test_the_top_of_the_package_is_seen_at_a_glance() -> None:
    entries = {path.relative_to(PACKAGE).parts[0] for path in MODULES}
    assert len(entries) <= 22


def implementations(path: Path, contract: str) -> int:
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return sum(any(ast.unparse(base).rpartition(".")[2] == contract for base in node.bases) for node in classes)


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_module_has_a_docstring_and_stays_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert len(text.splitlines()) <= 300
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > 60]


# Whose signature Transformers fixes: the function that models call.
_FIXED_SIGNATURES = {("interface.py", "_attention_interface")}


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_no_function_takes_more_than_six_parameters(path: Path) -> None:
    """What travels together is one value. Triton's kernels are exempt: their arguments are pointers and strides."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef) or (path.name, node.name) in _FIXED_SIGNATURES:
            continue
        if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [argument.arg for argument in taken if argument.arg not in ("self", "cls")]
        assert len(names) <= 6, f"{node.name} takes {', '.join(names)}"


def test_functions_of_a_run_are_typed() -> None:
    """A callable says what it takes: `Callable[..., Any]` hides it from mypy."""
    for path in (PACKAGE / "runs").glob("*.py"):
        assert "Callable[...," not in path.read_text(encoding="utf-8"), named(path)


# Names that said little; the field has its own words.
_PRIVATE_WORDS = {
    *("again", "asked", "beat", "beats", "begun", "chosen", "facts", "found", "known", "mine", "most", "one", "opened"),
    *("products", "shown", "those", "whose"),
}


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_names_are_words_of_the_field(path: Path) -> None:
    nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    assert not {name.strip("_").lower() for name in names} & _PRIVATE_WORDS


def test_module_names_say_what_they_are_about() -> None:
    vague = {"utils", "util", "common", "helpers", "misc", "config", "constants"}
    assert not [named(path) for path in MODULES if path.stem in vague]


def test_no_text_names_a_path_of_the_machine_it_was_written_on() -> None:
    mine = re.compile(r"(?<![\w.~$}-])/(?:work|opt|root|tmp/[a-z])/\w")
    own = [path for path in ROOT.rglob("*") if path.is_file() and is_own_text(path)]
    assert len(own) > len(MODULES)
    assert not [named(path) for path in own if mine.search(path.read_text(encoding="utf-8", errors="replace"))]


def is_own_text(path: Path) -> bool:
    parts = set(path.relative_to(ROOT).parts)
    built = any(part.endswith(("_cache", ".egg-info")) or part == "__pycache__" for part in parts)
    return not built and parts.isdisjoint(SKIPPED) and path.name != "LICENSE"
