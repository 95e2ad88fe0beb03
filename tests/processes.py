"""The processes of one start of a run, found by a mark in their environment, whoever their parents are by now."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def marked(mark: str) -> list[int]:
    """All living processes that have `mark`, a NAME=VALUE, in their environment; a zombie has none."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if mark in _environment(path)]


def ranks_of(starter: int, mark: str, count: int) -> dict[int, int]:
    """The living process of every rank: the starter's children, or itself where there is one rank."""
    if count == 1:
        return {0: starter}
    ranks = {}
    for process in marked(mark):
        with suppress(OSError):
            parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
            named = [word for word in _environment(Path(f"/proc/{process}/environ")) if word.startswith("RANK=")]
            if parent == starter and named:
                ranks[int(named[0].partition("=")[2])] = process
    return ranks


def send(process: int, number: int, mark: str) -> bool:
    """Whether signal `number` reached `process`: not where it is gone and its id may be another's."""
    with suppress(ProcessLookupError):
        if mark in _environment(Path(f"/proc/{process}/environ")):
            os.kill(process, number)
            return True
    return False


def _environment(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []  # gone, or another user's
