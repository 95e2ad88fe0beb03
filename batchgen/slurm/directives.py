"""Options of sbatch, as `#SBATCH` lines."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from batchgen.slurm.queue import SlurmError

# sbatch's short options that it also has a long name for; see sbatch(1).
_LONG = {
    "A": "account",
    "a": "array",
    "C": "constraint",
    "c": "cpus-per-task",
    "D": "chdir",
    "d": "dependency",
    "e": "error",
    "G": "gpus",
    "J": "job-name",
    "M": "clusters",
    "N": "nodes",
    "n": "ntasks",
    "o": "output",
    "p": "partition",
    "q": "qos",
    "t": "time",
    "w": "nodelist",
    "x": "exclude",
}
_REFUSED = {"wrap": "the command stands behind --", "array": "--array N, with N shards, does it"}
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)  # what --signal may be
_WARNING_NAMES = {name for warning in WARNINGS for name in (warning.name.removeprefix("SIG"), str(warning.value))}
_PLAIN = re.compile(r"[\w./:,=@%+\[\]*-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Directive:
    """One option of sbatch: `--name=value`, or `--name` alone."""

    name: str  # the long name; a short one if sbatch has no other that we know
    value: str | None = None

    @property
    def word(self) -> str:
        """As on a command line, unquoted."""
        dashes = "-" if len(self.name) == 1 else "--"
        joint = " " if len(self.name) == 1 else "="
        return f"{dashes}{self.name}" if self.value is None else f"{dashes}{self.name}{joint}{self.value}"

    @property
    def line(self) -> str:
        """The line of a script. sbatch takes a value between double quotes as it stands, but for a backslash.

        Raises:
            SlurmError: the value holds a line break, behind which bash would read on.
        """
        if "\n" in (self.value or ""):
            raise SlurmError(f"--{self.name} of the job would hold a line break, which no script can: {self.value!r}")
        if self.value is None or _PLAIN.fullmatch(self.value):
            return f"#SBATCH {self.word}"
        escaped = re.sub(r'(["\\])', r"\\\1", self.value)
        return f'#SBATCH {Directive(self.name, "").word}"{escaped}"'


def parse(words: Sequence[str]) -> list[Directive]:
    """Options of sbatch as a person types them; what follows one and is no option is its value.

    Raises:
        SlurmError: a word is no option, or cannot be written into a script.
    """
    directives: list[Directive] = []
    for word in words:
        if "\n" in word:
            raise SlurmError(f"an option of sbatch cannot hold a line break: {word!r}")
        if word.startswith("--"):
            name, given, value = word[2:].partition("=")
            directives.append(Directive(name, value if given else None))
        elif word.startswith("-") and len(word) > 1:
            directives.append(Directive(_LONG.get(word[1], word[1]), word[2:].removeprefix("=") or None))
        elif directives and directives[-1].value is None:
            directives[-1] = Directive(directives[-1].name, word)
        else:
            raise SlurmError(f"{word!r} is no option of sbatch. Options of sbatch come first, then --, then run …")
    return [usable(directive) for directive in directives]


def usable(directive: Directive) -> Directive:
    """As a job can have it. A warning signal goes to the batch process, which passes it on; without B: it would kill
    the tasks' shells.

    Raises:
        SlurmError: it contradicts what a run needs.
    """
    if directive.name in _REFUSED:
        raise SlurmError(f"sbatch's own --{directive.name} cannot be used here: {_REFUSED[directive.name]}")
    if directive.name != "signal":
        return directive
    match = re.fullmatch(r"(?:([RB]+):)?((?:SIG)?(\w+)(?:@\d+)?)", directive.value or "", re.ASCII | re.IGNORECASE)
    if match is None or match[3].upper() not in _WARNING_NAMES:
        raise SlurmError(
            f"{directive.word} cannot be used here: a job takes only USR1, USR2 and XCPU for the warning before its "
            "time limit, and after any other signal it does not begin again. Say --signal=USR2@SECONDS"
        )
    reserved = "R" if "R" in (match[1] or "").upper() else ""
    return Directive("signal", f"{reserved}B:{match[2]}")


def merged(*lists: Iterable[Directive]) -> list[Directive]:
    """All of them, a later one in the place of an earlier one of its name."""
    return list({directive.name: directive for directives in lists for directive in directives}.values())
