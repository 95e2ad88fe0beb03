"""The command line as a whole: what `--help` says, and what it loads for that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from batchgen import commands
from batchgen.commands import CommandError, main

NAMES = sorted(path.stem.replace("_", "-") for path in Path(commands.__file__).parent.glob("[!_]*.py"))
CONTEXT = click.Context(main)


def test_every_command_file_is_a_command_with_a_summary() -> None:
    assert main.list_commands(CONTEXT) == NAMES
    assert sorted(commands._SUMMARIES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_command_has_the_name_of_its_file_and_the_summary_that_help_shows(name: str) -> None:
    command = main.get_command(CONTEXT, name)
    assert command is not None
    assert command.name == name
    assert command.get_short_help_str(limit=1000) == commands._SUMMARIES[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_every_command_shows_every_option_with_its_meaning(name: str, flag: str) -> None:
    result = CliRunner().invoke(main, [name, flag])
    assert result.exit_code == 0
    command = main.get_command(CONTEXT, name)
    assert command is not None
    assert result.output.startswith("Usage: ")
    for option in command.params:
        assert isinstance(option, click.Argument) or option.opts[0] in result.output
    undocumented = [option.name for option in command.params if isinstance(option, click.Option) and not option.help]
    assert not [name for name in undocumented if name != "output_format"]


def test_help_lists_all_commands() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert [
        line.split()[0] for line in result.output.partition("Commands:\n")[2].splitlines() if line[2] != " "
    ] == NAMES


def test_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(main, ["generate"])
    assert result.exit_code == 2
    assert "No such command 'generate'" in result.output


def test_sentences_exit_with_4() -> None:
    assert commands.fail(ValueError("a sentence")).exit_code == 4
    assert CommandError("a sentence").format_message() == "a sentence"


LOADED = """
import sys
from click.testing import CliRunner
from batchgen.commands import main
CliRunner().invoke(main, [*{arguments}, "--help"], catch_exceptions=False)
print(*sorted(sys.modules))
"""


@pytest.mark.parametrize(
    "arguments", [[], *([name] for name in NAMES)], ids=lambda names: " ".join(names) or "batchgen"
)
def test_help_loads_no_heavy_module_and_no_other_command(arguments: list[str]) -> None:
    program = LOADED.format(arguments=arguments)
    ended = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    loaded = set(ended.stdout.split())
    assert loaded.isdisjoint({"accelerate", "datasets", "deepspeed", "numpy", "pyarrow", "torch", "transformers"})
    if not arguments:
        assert loaded.isdisjoint({f"batchgen.commands.{name.replace('-', '_')}" for name in NAMES})
        assert loaded.isdisjoint({"batchgen.runs.flow", "json", "logging"})
