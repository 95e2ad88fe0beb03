"""Run folders for the tests of the report, made by real runs."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.commands.starts import Started, batchgen, call, echo, prompts, recorded, slow_echo, until, write_rows

# Ends a script or an attribute, and calls for help, wherever it is taken for markup.
EVIL = """</script><img src="x" onerror="alert('hacked')"><script>alert(1)</script>'"&"""
BAD = ["{broken", {"id": "no-prompt", "prompt": None}, {"id": EVIL, "prompt": 7}]


def interrupted(folder: Path) -> Path:
    """A run of 300 rows with two ranks, killed in the middle; good rows alone are recorded."""
    rows = write_rows(folder / "prompts.jsonl", prompts(300))
    out = folder / "out"
    with Started(batchgen(*slow_echo(rows, "-o", out), "--ranks", 2), folder) as process:
        until(lambda: recorded(out) > 20, process)
        process.send(signal.SIGKILL)
        process.end()
    return out


def finished(folder: Path) -> Path:
    """The same run once more to its end, with one rank."""
    out = interrupted(folder)
    assert call(folder, *echo(folder / "prompts.jsonl", "-o", out)).code == 0
    return out


def with_errors(folder: Path) -> Path:
    """A finished run with rows that failed, and texts that are markup."""
    rows = [*prompts(120), {"id": "evil", "prompt": EVIL, "note": EVIL}, *BAD]
    rows.append({"id": "long", "prompt": "start " + "word " * 900 + "end", "max_new_tokens": 9000})
    assert call(folder, *echo(write_rows(folder / "p.jsonl", rows), "-o", "out", "--batch-size", 16)).code == 3
    return folder / "out"
