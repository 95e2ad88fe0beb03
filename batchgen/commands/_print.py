"""What commands print: paths as the bytes that they are, for scripts; sentences, whatever is in them.

A name of a file is any bytes; Python keeps those that are no text as half of a surrogate pair (`os.fsdecode`), which no
encoding holds. A row may bring a character that the terminal's encoding has not.
"""

from __future__ import annotations

import codecs
import io
import os
import sys

import click

_NEVER_FAILS = "batchgen-never-fails"  # an error handler of `codecs`


def print_path(path: str | os.PathLike[str]) -> None:
    """Prints `path` on stdout as the bytes that it is in the file system, so that a script can open it."""
    click.echo(os.fsencode(path))


def let_nothing_fail_to_print() -> None:
    """From now on, stdout and stderr take every text, that of Click, of a log or of a progress bar, too."""
    codecs.register_error(_NEVER_FAILS, _keep_or_escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test or a notebook may have put something else there
            stream.reconfigure(errors=_NEVER_FAILS)


def _keep_or_escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """The bytes of a name as they are, so that a command that is printed can be called; of the rest an escape."""
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1  # what follows may be of the other kind
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)
