"""What people write behind a flag, and the value that is meant."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import click

from batchgen.types import FIT

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_LETTERS = {meant: letter for letter, meant in _ESCAPES.items()}
_ESCAPE = re.compile(r"\\(?:([ntr\\])|u([0-9a-fA-F]{4}))")


class TokenLimit(click.ParamType[int]):
    """A number of new tokens, or "fit"."""

    name = "N|fit"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; `FIT` for "fit"."""
        try:
            return FIT if value == "fit" else int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor fit", param, ctx)


def json_object(context: click.Context, parameter: click.Parameter, text: str | None) -> dict[str, object]:
    """The object that is written as JSON."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise click.BadParameter("must be a JSON object, like '{\"enable_thinking\": false}'")
    return value


def template_text(context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    """The template, which may stand in a file: @FILE."""
    if text is None or not text.startswith("@"):
        return text
    return _read_text(text[1:])


class FileText(NamedTuple):
    """A text that stands in a file."""

    name: str
    text: str


def file_text(context: click.Context, parameter: click.Parameter, name: str | None) -> FileText | None:
    """The text of the file of this name."""
    return None if name is None else FileText(name, _read_text(name))


def _read_text(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except UnicodeError as error:
        raise click.BadParameter(
            f"{name} is not UTF-8 ({error}). If it is UTF-16: iconv -f UTF-16 -t UTF-8 {name} > other.txt"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise click.BadParameter(f"cannot read {name}: {error}") from error


def stop_texts(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    """The stop texts, with their escapes read: a shell passes a backslash and an n on, where a new line is meant."""
    for text in texts:
        # Of LaTeX, perhaps. A rank's starter has said it.
        if re.search(r"(?<!\\)(?:\\\\)*\\[ntr][a-z]", text) and "BATCHGEN_STARTER" not in os.environ:
            read = json.dumps(unescape(text), ensure_ascii=False)
            click.echo(f"batchgen: --stop {text} is read as {read}; a backslash of its own is written \\\\", err=True)
    return tuple(map(unescape, texts))


def unescape(text: str) -> str:
    """`text` with \\n, \\t, \\r, \\\\ and \\uXXXX read; any other backslash stands for itself."""
    read = _ESCAPE.sub(lambda match: _ESCAPES[match[1]] if match[1] else chr(int(match[2], 16)), text)
    # Two escapes that are a pair of surrogates are one character.
    return read.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def escape(text: str) -> str:
    """Writes `text` so that `unescape` reads it."""
    return re.sub(r"[\n\t\r\\]", lambda match: f"\\{_LETTERS[match[0]]}", text)


id_prefix = click.option(
    "--id-prefix",
    type=click.Choice(["file"]),
    help="Put the name of its file and a colon before each row's own id, so that files may have the same ids.",
)
"""For commands that make a run."""
