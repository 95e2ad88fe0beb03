"""Run folders for the tests of the report, made by real runs."""

from __future__ import annotations

import signal
from pathlib import Path

from batchgen.checkpoint import RunFolder
from batchgen.types import Batch, Details, Generation, Markup, Thinking
from tests.checkpoint.folders import commit, died, made
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


def with_constraints(folder: Path) -> Path:
    """A finished run with a row that was cut before its constraint was met, one that was refused, and samples."""
    rows = [
        {"id": "cut", "prompt": "yes", "choice": ["yes and more"], "max_new_tokens": 2},
        {"id": "met", "prompt": "yes", "choice": ["yes"]},
        {"id": "refused", "prompt": "x", "json_schema": {"type": "array", "uniqueItems": True}},
        {"id": "samples", "prompt": "thrice", "n": 20},
    ]
    assert call(folder, *echo(write_rows(folder / "p.jsonl", rows), "-o", "out")).code == 3
    return folder / "out"


def with_calls(folder: Path) -> RunFolder:
    """A run of rows that think and call tools, as the real writer renders what a model has written."""
    markup = Markup(Thinking("<think>", "</think>", is_open=False), "hermes")

    def row(index: int, text: str, others: tuple[str, ...] = (), thought: int = 5) -> Generation:
        first, *further = [
            Generation(
                *(index, f"r{index}", each, "stop", 4, 10, None),
                {"messages": [{"role": "user", "content": f"Question {index}"}]},
                details=Details(raw_text=each, reasoning_tokens=thought),
                sample=sample,
                markup=markup,
            )
            for sample, each in enumerate((text, *others))
        ]
        first.others = tuple(further)
        return first

    call_ = '<tool_call>{"name": "weather", "arguments": {"city": "%s"}}</tool_call>'
    run = made(folder, 4)
    died(run)
    rows = [
        row(0, f"<think>Perhaps {EVIL}</think>{call_ % 'Bonn'}\n{call_ % '<b>Ulm</b>'}"),
        row(1, "<think>Easy.</think>Four."),
        row(2, f"<think>One.</think>First.{call_ % 'Rom'}", ("Second.", "<think>Three.</think>Third.")),
        row(3, "Plain.", thought=0),
    ]
    commit(run, 1, 0, Batch(rows))
    return run
