"""Writes the pages of the manual that are made from the program: `cli.md` from the commands, `modules.md` from the
docstrings. `scripts/docs --write` runs this file; a test compares the pages with what it would write.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path

import click

from batchgen.commands import main

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "batchgen"

_CLI = """# Command line

This page is written by `scripts/docs --write` from the commands themselves. Each of them prints the same with `--help`.

Results go to stdout (the path of the generations, a table, JSON), everything else to stderr. The page
[Output](output.md#exit-codes) says what the exit codes mean.
"""

_MODULES = """# Modules

This page is written by `scripts/docs --write`: every module, with the first sentence of its docstring. How they work
together is on the page [Architecture](architecture.md).
"""


def pages() -> dict[str, str]:
    """The text of each generated page, by its name in docs/."""
    return {"cli.md": _CLI + "".join(_commands()), "modules.md": _MODULES + "".join(_rooms())}


def _commands() -> Iterator[str]:
    context = click.Context(main, info_name="batchgen")
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        yield from _command(command, f"batchgen {name}", 2)


def _command(command: click.Command, name: str, level: int) -> Iterator[str]:
    context = click.Context(command, info_name=name, **main.context_settings)
    usage = command.get_usage(context).removeprefix("Usage: ")
    yield f"\n{'#' * level} {name}\n\n```text\n{' '.join(usage.split())}\n```\n"
    for paragraph in (command.help or "").split("\n\n"):
        yield f"\n{_escaped(' '.join(paragraph.split()))}\n"
    options = [parameter for parameter in command.get_params(context) if isinstance(parameter, click.Option)]
    records = [record for option in options if (record := option.get_help_record(context))]
    yield "\n| option | meaning |\n|---|---|\n"
    for option, meaning in records:
        yield f"| {_code(option)} | {_escaped(' '.join(meaning.split()))} |\n"
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            if not found.hidden:
                yield from _command(found, f"{name} {inner}", level + 1)


def _code(text: str) -> str:
    """An option as code; a vertical line would end the cell of the table, in one kind of Markdown or the other."""
    return f"`{text}`" if "|" not in text else f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def _escaped(text: str) -> str:
    """Help text as Markdown: what stands between backquotes stays, and nothing else is markup."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_|<\[])", r"\\\1", part) for part in parts)


def _rooms() -> Iterator[str]:
    top = sorted(path for path in PACKAGE.iterdir() if path.suffix == ".py")
    yield "\n## The top of the package\n\n" + _table(top)
    for room in sorted(path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()):
        yield f"\n## {room.name}\n\n" + _table(sorted(room.rglob("*.py"), key=_place))


def _place(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).parts
    return (*parts[:-1], "") if parts[-1] == "__init__.py" else parts


def _table(paths: list[Path]) -> str:
    rows = (f"| `{path.relative_to(ROOT).as_posix()}` | {_escaped(_first_sentence(path))} |\n" for path in paths)
    return "| module | what it is |\n|---|---|\n" + "".join(rows)


def _first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.partition("\n\n")[0].split())
    end = re.search(r"[.:](?= [A-Z(]|$)", first)
    return first[: end.start()] if end else first


def write() -> None:
    """Writes the pages."""
    for name, text in pages().items():
        (ROOT / "docs" / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
