"""What libraries raise over a model's files, as one sentence for the person at the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from batchgen.engine import Died, EngineError
from batchgen.types import UserError

_LONGEST = 400  # characters of another library's words
# Advice of other libraries that nobody can follow here: settings that batchgen does not have, installs from a branch.
_ADVICE = re.compile(
    r"trust_remote_code|ignore_mismatched_sizes|pip install git\+|install --upgrade|look at the above report"
    r"|huggingface\.co/models'|source with the command",
    re.IGNORECASE,
)
# What says enough without the name of its class.
_PLAIN = (OSError, ValueError, ImportError, RuntimeError)


class ModelError(EngineError):
    """The model cannot be used: a sentence for the person at the terminal."""


def one_line(error: BaseException) -> str:
    """The words of an exception on one line, without advice that leads nowhere; its class where they say too little."""
    text = " ".join(str(error).split())
    kept = [part for part in re.split(r"(?<=[.!?])\s+", text) if not _ADVICE.search(part)]
    text = " ".join(kept).rstrip(" .")
    if len(text) > _LONGEST:
        text = text[:_LONGEST].rstrip() + " …"
    name = type(error).__name__
    if not text:
        return name
    return text if isinstance(error, _PLAIN) and not isinstance(error, UnicodeError) else f"{name}: {text}"


@contextmanager
def refuse_errors(what: str) -> Iterator[None]:
    """Turns whatever a library raises inside into a ModelError that begins with `what`; batchgen's own errors pass."""
    try:
        yield
    except (UserError, Died):
        raise
    except Exception as error:  # a library that meets damaged files can raise anything
        raise ModelError(f"{what}: {one_line(error)}") from error
