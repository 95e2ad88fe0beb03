"""The real command in a process of its own, for many small files: forked from one that has imported it all already."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.commands.starts import ENVIRONMENT, Ended

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *(
            "pytest",
            "batchgen.commands.run",
            "batchgen.commands.run_batch",
            "batchgen.runs.flow",
            "batchgen.engines.echo",
        ),
        *("batchgen.formats.arrow", "batchgen.formats.folder", "batchgen.formats.jsonl", "batchgen.formats.parquet"),
        *(
            "batchgen.runs.tables",
            "batchgen.requests.sandbox",
            "batchgen.runs.progress",
            "pyarrow.compute",
            "tests.bad_input.command",
        ),
    ]
)


def call(folder: Path, *arguments: object, before: Callable[[], None] | None = None) -> Ended:
    """`batchgen ARGUMENTS…` in `folder`, to its end, with Python's warnings as errors."""
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        words = [str(argument) for argument in arguments]
        process = _CONTEXT.Process(target=_work, args=(str(folder), words, str(out), str(err), before))
        process.start()
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"batchgen {' '.join(words)} has not ended:\n{err.read_text(errors='replace')}")
        code = process.exitcode
        assert code is not None
        # A byte that is not UTF-8 is what `os.fsdecode` makes of it.
        return Ended(code, *(stream.read_text("utf-8", "surrogateescape") for stream in (out, err)))


def _work(folder: str, words: list[str], out: str, err: str, before: Callable[[], None] | None) -> None:
    os.chdir(folder)
    for name, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["batchgen", *words]
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    warnings.simplefilter("error")
    if before is not None:
        before()
    from batchgen.commands import main

    main(prog_name="batchgen")


def answered(run: Path) -> list[dict[str, Any]]:
    """The rows that have come out, in order. Each line must be JSON, and the only one of its row."""
    found = [json.loads(line, parse_constant=_refuse) for line in lines(run / "generations.jsonl")]
    failed = [json.loads(line, parse_constant=_refuse) for line in lines(run / "errors.jsonl")]
    assert failed == [row for row in found if row["error"] is not None]
    assert [row["index"] for row in found] == list(range(len(found)))
    return found


def lines(path: Path) -> list[bytes]:
    """The lines of a file that ends with a newline, or is empty."""
    text = path.read_bytes()
    assert not text or text.endswith(b"\n")
    return text.split(b"\n")[:-1]


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")
