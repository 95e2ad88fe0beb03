"""One start of a run as real processes, what strikes it, and whether it ends as it may."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import disk
from tests.chaos.checker import Fault, check_survived, finished
from tests.chaos.draw import CUT_POWER, FAIL_DISK, FILL_DISK, SECOND_START, TOGETHER, Start
from tests.chaos.power import Journal
from tests.chaos.rows import Rows
from tests.chaos.thaw import thaw_if_not_missed
from tests.processes import marked, ranks_of, send

ROOT = Path(__file__).parents[2]

# From a disturbance to the last process gone. The longest way: a frozen rank is missed after 4 s of patience, or 8 s in
# a collective of DeepSpeed's start; its peers end; 30 s later it is killed. A stop while the model loads is obeyed at
# the first step; three ranks on two busy cores may load for 40 s. Before that, heartbeats are watched for 90 s.
END_SECONDS = 180.0
# A start that nothing ends: loading, all the work of the largest file that can be drawn (about 20 s), and the merge.
FINISH_SECONDS = 270.0
# About what a start takes until its ranks work: the time over which early disturbances spread.
_LOADING_SECONDS = {"echo": 0.6, "accelerate": 5.0, "paged": 5.0, "ds-zero": 8.0, "ds-inference": 8.0}
# A rank: the others spread over this time from when the first one works.
_WORKING_SECONDS = {"echo": 0.1, "accelerate": 1.0, "paged": 1.0, "ds-zero": 1.0, "ds-inference": 1.0}
# Operations on files of a start, besides four a batch: before the first one, or fewer, and after the last.
_FIRST_OPERATIONS, _LAST_OPERATIONS = 31, 20
SIGNALS_THAT_TRACE = ("stop all", "stop one", "stop two")  # an interrupt while Python itself starts


@dataclass
class Place:
    """Where a history happens."""

    folder: Path  # logs and the prompts
    rows: Rows
    model: Path | None
    library: Path  # of `power`
    product: Path  # the folder that holds the package `batchgen`
    is_mounted: bool  # `disk` is one of its own
    out: Path  # the run folder, on the disk
    harmed: set[str]  # files that something else than a cut has damaged
    starts: int = 0

    @property
    def disk(self) -> Path:
        """The folder of the run folder."""
        return self.folder / "disk"

    @property
    def attempts(self) -> int:
        """The number of the last one that has a claim."""
        return max((int(path.stem) for path in self.out.glob("attempts/?????.json")), default=0)

    def claim(self, number: int) -> Path:
        return self.out / "attempts" / f"{number:05d}.json"

    def command(self, start: Start) -> list[str]:
        words = f"--engine {start.engine} --dtype float32 --ranks {start.ranks} --batch-size {start.batch_size}"
        words += f" --heartbeat-seconds {start.heartbeat:.3f} {' '.join(f'--set {each}' for each in start.settings)}"
        model = ["--model", str(self.model)] if self.model else []
        command = [sys.executable, "-m", "batchgen", "run", str(self.rows.path), "-o", str(self.out)]
        return [*command, *model, *words.split()]

    @property
    def merged(self) -> bool:
        return (self.out / "generations.jsonl").exists()


@dataclass(frozen=True)
class End:
    """How a start ended."""

    start: Start
    code: int
    seconds: float  # from its first stroke; for what ends nothing, from the last
    struck: bool  # False: it had ended before
    how: str  # more about the stroke

    def __str__(self) -> str:
        late = "" if self.struck or self.start.kind == "none" else ", which came too late"
        how = f" ({self.how})" if self.how else ""
        return f"{self.start}{how}{late}: exit code {self.code} after {self.seconds:.1f} s"


class Running:
    """A start at work: its processes have a mark, by which they are found whoever their parents are."""

    def __init__(self, place: Place, start: Start, journal: Journal | None, log: Path) -> None:
        self.start, self.journal = start, journal
        self.mark = f"BATCHGEN_HISTORY={os.getpid()}-{time.monotonic_ns()}"
        self.number = 1 + place.attempts
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict([self.mark.split("=")])}
        if journal is not None:
            # `paged` commits once a second.
            batches = 3 if start.engine == "paged" else place.rows.count / start.batch_size / start.ranks
            commits = 4 * math.ceil(batches)
            after = int(start.moment * (commits + _LAST_OPERATIONS))
            at = 1 + (int(start.moment * _FIRST_OPERATIONS) if start.early else _FIRST_OPERATIONS + after)
            at = start.operation or at
            error = errno.ENOSPC if start.kind == FILL_DISK else start.error
            environment.update(journal.environment(place.library, at, error))
        with log.open("ab") as file:
            command = place.command(start)
            self.starter = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=place.product)

    def works(self, out: Path) -> bool:
        """Whether a rank is through with loading."""
        paths = out.glob(f"attempts/{self.number:05d}-*.json")
        return any(b'"state": "loading"' not in path.read_bytes() for path in paths)

    def kill(self) -> None:
        """Leaves no process."""
        for process in marked(self.mark):
            send(process, signal.SIGKILL, self.mark)


def carry_out(start: Start, place: Place, refused: tuple[str, ...] = ()) -> End:
    """Starts the run, strikes it and sees it end.

    Args:
        refused: sentences of which the start must say one, and not work.
    """
    place.starts += 1
    log = place.folder / f"start-{place.starts:02d}.log"
    shimmed = start.kind in (CUT_POWER, FAIL_DISK) or (start.kind == FILL_DISK and not place.is_mounted)
    journal = Journal(place.disk, place.folder) if shimmed else None
    running = Running(place, start, journal, log)
    how = ""
    try:
        strokes = [] if start.kind == "none" or journal else _strike(running, place)
        if journal is not None:
            _await_power(running, journal)
        if strokes and start.kind == "freeze one":
            thaw_if_not_missed(running.starter, running.mark, place.claim(running.number), start, END_SECONDS)
        begun = (strokes or [time.monotonic()])[-1 if start.kind in ("pause one", SECOND_START) else 0]
        lasts = start.kind in ("none", "pause one", SECOND_START, FAIL_DISK) or not strokes
        code = await_end(running.starter, running.mark, FINISH_SECONDS if lasts else END_SECONDS)
        if journal is not None:
            how = _read(journal, start, place)
            strokes = [begun] if journal.struck else []
        if refused:
            _check_refused(code, log, refused)
        else:
            check_exit(start, code, place, running.number, bool(strokes), log)
    except Fault as fault:
        said = log.read_text(errors="replace")[-3000:]
        raise Fault(fault.kind, f"{start}: {fault}\n{said}", fault.rows) from fault
    finally:
        running.kill()
        running.starter.wait()
        disk.empty(place.disk)
    return End(start, code, time.monotonic() - begun, bool(strokes), how)


def _strike(running: Running, place: Place) -> list[float]:
    """Waits for the moment, then strikes; gives the times of the strokes: none, where the run has ended before."""
    start, starter = running.start, running.starter
    deadline = time.monotonic() + FINISH_SECONDS
    while not start.early and starter.poll() is None and not running.works(place.out):
        if time.monotonic() > deadline:
            raise Fault("hung", f"no rank works after {FINISH_SECONDS:.0f} s")
        time.sleep(0.005)
    loading, working = _LOADING_SECONDS[start.engine], _WORKING_SECONDS[start.engine] * start.ranks
    time.sleep(start.moment * (loading if start.early else working))
    if starter.poll() is not None:
        return []
    if start.kind == FILL_DISK:
        disk.fill(place.disk)
        return [time.monotonic()]
    if start.kind == SECOND_START:
        return _start_again(running, place)
    return _send(running)


def _send(running: Running) -> list[float]:
    start, starter, mark = running.start, running.starter, running.mark
    ranks = ranks_of(starter.pid, mark, start.ranks)
    while start.early and not ranks.keys() >= set(start.victims) and starter.poll() is None:
        time.sleep(0.02)
        ranks = ranks_of(starter.pid, mark, start.ranks)
    struck = [ranks[rank] for rank in start.victims if rank in ranks] if start.victims else [starter.pid]
    if start.kind == "kill all":
        struck = marked(mark)
    elif start.kind == "pause one":
        struck *= 2
    signals = start.signals * len(struck) if len(start.signals) == 1 else start.signals
    strokes = []
    for place, (process, number) in enumerate(zip(struck, signals, strict=False)):
        time.sleep(start.gap if place and start.kind != "kill all" else 0.0)
        if send(process, number, mark):
            strokes.append(time.monotonic())
    return strokes


def _start_again(running: Running, place: Place) -> list[float]:
    """A second start on the same folder: refused while the first one has its claim."""
    log = place.folder / f"start-{place.starts:02d}-second.log"
    with _stopped(running, place.claim(running.number)) as holds:
        if not holds:
            return []
        with log.open("ab") as file:
            command, variables = place.command(running.start), {**os.environ, "OMP_NUM_THREADS": "1"}
            second = subprocess.Popen(command, stdout=file, stderr=file, cwd=place.product, env=variables)
            try:
                code = second.wait(END_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise Fault("hung", f"a second start has not ended after {END_SECONDS:.0f} s") from error
            finally:
                second.kill()
        _check_refused(code, log, ("is in use",))
    return [time.monotonic()]


@contextmanager
def _stopped(running: Running, claim: Path) -> Iterator[bool]:
    """The starter, with its `claim`, does not end meanwhile; False if it has, or has none yet."""
    stopped = send(running.starter.pid, signal.SIGSTOP, running.mark)
    try:
        yield stopped and claim.exists() and json.loads(claim.read_bytes())["ended"] is None
    finally:
        send(running.starter.pid, signal.SIGCONT, running.mark)


def _await_power(running: Running, journal: Journal) -> None:
    """Waits for the end or for the stroke; where the power went, nobody is left."""
    deadline = time.monotonic() + FINISH_SECONDS
    while running.starter.poll() is None and time.monotonic() < deadline:
        if running.start.kind == CUT_POWER and journal.path.exists() and b"\nX\t" in b"\n" + journal.path.read_bytes():
            running.kill()
        time.sleep(0.01)
    if running.start.kind == CUT_POWER:
        running.kill()


def _read(journal: Journal, start: Start, place: Place) -> str:
    journal.read()
    if start.kind == CUT_POWER and journal.struck:
        said = journal.acknowledged()
        journal.cut(random.Random(f"{start.moment}"))
        check_survived(said, place.harmed, place.out)
    return f"at {journal.struck}" if journal.struck else ""


def await_end(starter: subprocess.Popen[bytes], mark: str, seconds: float) -> int:
    """The exit code of `starter`, once no process of its start is left.

    Raises:
        Fault: one is left after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while starter.poll() is None or marked(mark):
        if time.monotonic() > deadline:
            raise Fault("hung", f"{len(marked(mark))} processes are left after {seconds:.0f} s")
        time.sleep(0.02)
    assert starter.returncode is not None
    return starter.returncode


def _check_refused(code: int, log: Path, sentences: tuple[str, ...]) -> None:
    said = log.read_text(errors="replace")
    if code != 4 or not any(sentence in said for sentence in sentences) or "Traceback" in said:
        raise Fault("exit", f"exit code {code} without {' or '.join(map(repr, sentences))}: {said[-2000:]}")


def check_exit(start: Start, code: int, place: Place, number: int, struck: bool, log: Path) -> None:
    """Raises Fault if a start that was struck like this may not end with exit code `code`."""
    claim = place.claim(number)
    done = 3 if place.rows.errors else 0
    complete = place.merged and len(finished(place.out)) == place.rows.count
    allowed = {done if complete else 75}
    strikes_starter = start.ranks == 1 or not start.victims
    if not struck or start.kind in ("none", "pause one", SECOND_START):
        allowed = {done}
    elif start.kind in (FAIL_DISK, FILL_DISK):
        allowed |= {75, 4}  # 4 before the claim; 75 too where the output could not be replaced
    elif start.kind == CUT_POWER or (strikes_starter and signal.SIGKILL in start.signals):
        allowed.add(-signal.SIGKILL)
    elif strikes_starter and (not claim.exists() or json.loads(claim.read_bytes())["ended"] is not None):
        # Before the claim and after its end nobody needs to answer; click says 1 to an early interrupt.
        allowed |= {-number for number in start.signals} | {1}
    if code not in allowed:
        raise Fault("exit", f"exit code {code}, not {' or '.join(map(str, sorted(allowed)))}")
    said = log.read_text(errors="replace")
    # Ranks that call together say where they were when a peer died; everybody else has sentences.
    if "Traceback (most recent" in said and start.engine not in TOGETHER and start.kind not in SIGNALS_THAT_TRACE:
        raise Fault("exit", f"exit code {code} with a traceback")
