"""What a run folder remembers of its jobs, since a queue forgets a job minutes after its end.

In the run folder:

    jobs/12.json          a job of this run: what was submitted, and when
    jobs/12.out           its output (12_3.out of task 3 of an array)
    jobs/12.ended.json    why it has ended by itself (12_3.ended.json)
    jobs/12.unwritten     all rows are done, but the answers are not where they should be
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from batchgen.checkpoint import CheckpointError, read_json, to_json
from batchgen.files import write_atomic

GAVE_UP = "gave up"  # another start would not help, so that the jobs that follow need not try


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a run, an array as one."""

    number: str
    submitted: float  # Unix time
    script: str = ""  # a path; "" if it is not known, the job being submitted by hand
    shards: int = 0  # of the run, if it is an array
    offset: int = 0  # added to the array's index; a run of more shards than an array may have takes several


def _folder(run: Path) -> Path:
    return run / "jobs"


def log_pattern(run: Path, array: bool) -> str:
    """sbatch's --output of a run."""
    folder = str(_folder(run.absolute())).replace("%", "%%")
    return f"{folder}/%A_%a.out" if array else f"{folder}/%j.out"


def prepare(run: Path) -> None:
    """Makes the folder that Slurm writes a job's output into.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        _folder(run).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the run folder {run}: {error.strerror or error}") from error


def remember(run: Path, job: Job) -> None:
    """Keeps `job`, unless it is known already."""
    path = _folder(run) / f"{job.number}.json"
    if not path.exists():
        prepare(run)
        write_atomic(path, to_json(asdict(job)))


def jobs(run: Path) -> list[Job]:
    """All jobs of a run, oldest first."""
    paths = [path for path in _folder(run).glob("*.json") if path.stem.isdigit()]
    return [Job(**read_json(path)) for path in sorted(paths, key=lambda path: int(path.stem))]


def note_end(run: Path, task: str, outcome: str, why: str) -> None:
    """Keeps why job `task`, like 12 or 12_3, has ended by itself."""
    prepare(run)
    write_atomic(_folder(run) / f"{task}.ended.json", to_json({"outcome": outcome, "why": why, "time": time.time()}))


def end_of(run: Path, task: str) -> tuple[str, str] | None:
    """Outcome and reason, as `note_end` has kept them."""
    path = _folder(run) / f"{task}.ended.json"
    if not path.exists():
        return None
    recorded = read_json(path)
    return str(recorded["outcome"]), str(recorded["why"])


def note_unwritten(run: Path, task: str, unwritten: bool) -> None:
    """Keeps whether job `task` has left all rows done, but answers that are not written."""
    path = _folder(run) / f"{task}.unwritten"
    if unwritten:
        prepare(run)
        path.touch()
    else:
        path.unlink(missing_ok=True)


def is_unwritten(run: Path, task: str) -> bool:
    """As `note_unwritten` has kept it."""
    return (_folder(run) / f"{task}.unwritten").exists()
