"""How a command, an attempt or a row ends: exit codes, reasons, errors that a person can mend."""

from __future__ import annotations

from enum import IntEnum
from typing import Literal


class UserError(Exception):
    """What the person at the terminal can mend: the text is a sentence that says what is wrong and what to do."""


class ExitCode(IntEnum):
    """How a command of batchgen ends. Click's own 1 and 2 say nothing about a run, so no outcome of one uses them."""

    ALL_GOOD = 0
    SOME_FAILED = 3  # the run is finished, and some rows have failed
    CANNOT_RUN = 4  # the person at the terminal must change something
    RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on


FinishReason = Literal["stop", "length", "tool_calls"]

MACHINE_ERRORS = ("out_of_memory", "not_finite", "engine")
"""Types of what a row has met at work: another start may not, on a larger machine or with another engine."""

CANNOT_WRITE = "cannot write to"
"""How the reason of an attempt begins that has ended for a full or failing disk."""

TOO_MANY_FAILED = "more than --max-error-rate allows"
"""Part of the reason of an attempt that has ended for it."""
