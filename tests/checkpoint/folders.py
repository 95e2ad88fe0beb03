"""Run folders for the tests of the checkpoint, made by the real writer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from batchgen.checkpoint import Attempt, RunFolder, Writer, attempts
from batchgen.files import write_atomic
from batchgen.requests.output import renderer
from batchgen.types import Batch, Generation, RowError
from batchgen.world import World

ROOT = Path(__file__).parents[2]

ALONE = World()

render = renderer("m", 0, "openai", False)


def made(path: Path, rows: int) -> RunFolder:
    """A new run folder for an input of `rows` rows."""
    folder = RunFolder(path / "run")
    folder.make()
    folder.check_or_create({"rows": rows}, {})
    return folder


def generation(index: int, text: str = "text", *, failed: bool = False) -> Generation:
    error = RowError("too_long", f"row {index} is too long", index + 1) if failed else None
    reason = None if failed else "stop"
    return Generation(index, f"r{index}", None if failed else text, reason, 3, 0 if failed else 2, error, {"n": index})


def batch(rows: Sequence[int], text: str = "text", *, failed: Collection[int] = ()) -> Batch:
    return Batch([generation(row, text, failed=row in failed) for row in rows], padded_tokens=1, peak_memory_bytes=9)


def commit(folder: RunFolder, attempt: int, stream: int, *batches: Batch) -> tuple[Path, Path]:
    """The files of generations and of records, after `batches` have been committed."""
    writer = Writer(folder.path, attempt, stream, stream, render)
    for number, one in enumerate(batches):
        writer.commit(one, 0.5 + number)
    writer.close()
    name = f"{attempt:05d}-{stream:05d}.jsonl"
    return folder.path / f"generations-{name}", folder.path / f"batches-{name}"


def good_rows(folder: RunFolder, rows: int) -> set[int]:
    done = folder.done(rows)
    return {row for row in range(rows) if done.is_good(row)}


def objects(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process of its own that runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> str:
    """What `process` printed, once it has ended well."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def edit(path: Path, **changed: object) -> None:
    write_atomic(path, json.dumps(json.loads(path.read_bytes()) | changed).encode())


def elsewhere(attempt: Attempt) -> None:
    """Makes `attempt` one of another host."""
    edit(attempt.path, host="elsewhere")
    for path in attempt.folder.attempts.glob(f"{attempt.number:05d}-*.json"):
        edit(path, host="elsewhere")


def died(folder: RunFolder, world: World = ALONE, *, ranks: int = 1) -> Attempt:
    """An attempt whose process is gone, in the middle of its work."""
    code = """
import sys
from pathlib import Path
from batchgen.checkpoint import Heartbeat, RunFolder, claim
from batchgen.world import World
job, restarts, launch = sys.argv[2], int(sys.argv[3]), sys.argv[4]
attempt = claim(RunFolder(Path(sys.argv[1])), World(job=job, restarts=restarts, launch=launch), {}, 0.05)
for rank in range(int(sys.argv[5])):
    Heartbeat(attempt, rank, lambda: {"state": "running"}).write()
"""
    output(start(code, folder.path, world.job, world.restarts, world.launch, ranks))
    return attempts(folder)[-1]
