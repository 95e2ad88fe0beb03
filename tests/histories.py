"""Random histories of runs: uneven work, bad rows, stops, kills, frozen ranks; then the proof of exactly once.

    scripts/histories [HISTORIES [SEED [ENGINE]]]

Each seed draws a prompt file and one to four disturbed starts of a run over it, then one undisturbed start finishes. No
start may outlast its time, and the output is that of an unbroken `accelerate` run. The suite lives through a few.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.processes import marked, ranks_of, send
from tests.uneven_rows import Fault, Known, Rows, check, known_prompts, save_models, write_rows

ROOT = Path(__file__).parents[1]

# From a disturbance to the last process gone. The longest way to an end: a frozen rank is missed after 4 s of patience,
# or 8 s inside a collective of DeepSpeed's start; its peers end; 30 s of grace later it is killed. A stop that comes
# while the model loads is obeyed at the first step, and three ranks that share two busy cores may load for 40 s.
END_SECONDS = 90.0
# A start that nothing ends: loading, all the work of the largest file that can be drawn (about 20 s), and the merge.
FINISH_SECONDS = 180.0
PATIENCE_SECONDS = 4  # of ranks whose peer is frozen for good
_LOADING_SECONDS = 8.0  # about what a start takes until its ranks work: the time over which early disturbances spread
_WORKING_SECONDS = 1.0  # a rank: the others spread over this time from when the first one works

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
KINDS = ("stop all", "stop one", "stop two", "kill one", "kill starter", "kill all", "pause one", "freeze one")
_NEEDS_PEERS = ("stop two", "freeze one")  # a lone process is the starter too, and nobody is there to miss it


@dataclass(frozen=True)
class Start:
    """How a run is started, and what then happens to it."""

    ranks: int
    batch_size: int
    heartbeat: float
    settings: tuple[str, ...] = ()
    engine: str = "ds-zero"
    kind: str = "none"
    early: bool = False  # while it loads: `moment` counts from the start of the process
    moment: float = 0.0
    victims: tuple[int, ...] = ()  # ranks, in the order in which they are struck
    signals: tuple[int, ...] = ()
    gap: float = 0.0  # seconds between two strokes; how long a rank pauses

    def __str__(self) -> str:
        names = "+".join(signal.Signals(number).name for number in self.signals)
        ranks = f" (rank {', '.join(map(str, self.victims))})" if self.victims else ""
        when = "loading" if self.early else "working"
        more = f" {' '.join(self.settings)}" if self.settings else ""
        what = f"{self.kind} {names}{ranks}, {when}" if self.kind != "none" else "undisturbed"
        return f"{self.ranks} rank(s), batch {self.batch_size}{more}: {what}"


@dataclass(frozen=True)
class End:
    """How a start ended."""

    start: Start
    code: int
    seconds: float  # from its first stroke; for a pause, which ends nothing, from the last
    struck: bool  # False: it had ended before

    def __str__(self) -> str:
        late = "" if self.struck or self.start.kind == "none" else ", which came too late"
        return f"{self.start}{late}: exit code {self.code} after {self.seconds:.1f} s"


@dataclass
class History:
    """What happened to one run."""

    rows: Rows
    ends: list[End] = field(default_factory=list)


def draw(seed: int, engine: str = "ds-zero") -> list[Start]:
    """The starts of a history; the last one is undisturbed."""
    choose = random.Random(seed)
    starts = []
    for _ in range(choose.randint(1, 4)):
        kind = choose.choice(KINDS if engine == "ds-zero" else KINDS[:-1])  # only ranks that call together miss one
        ranks = choose.randint(2 if kind in _NEEDS_PEERS else 1, 3)
        signals = {"stop": tuple(choose.choices(STOPS, k=2)), "kill": (signal.SIGKILL,), "freeze": (signal.SIGSTOP,)}
        signals["pause"] = (signal.SIGSTOP, signal.SIGCONT)
        struck = {"one": 1, "two": 2}.get(kind.split()[1], 0)
        start = _start(choose, ranks, engine)
        if kind == "freeze one":
            start = {**start, "settings": (*start["settings"], f"timeout_seconds={PATIENCE_SECONDS}")}
        starts.append(
            Start(
                **start,
                kind=kind,
                early=choose.random() < 0.3,
                moment=choose.random(),
                victims=tuple(choose.sample(range(ranks), struck)),
                signals=signals[kind.split()[0]][: 2 if kind in ("stop two", "pause one") else 1],
                gap=choose.uniform(0.0, 3.0),
            )
        )
    return [*starts, Start(**_start(choose, choose.randint(1, 3), engine))]


def _start(choose: random.Random, ranks: int, engine: str) -> dict[str, Any]:
    offloaded = choose.random() < 0.25 and engine == "ds-zero"
    return {
        "ranks": ranks,
        "batch_size": choose.choice((1, 2, 3, 5, 8)),
        "heartbeat": choose.uniform(0.05, 0.1),
        "settings": ("offload=cpu",) if offloaded else (),
        "engine": engine,
    }


def live(
    seed: int,
    folder: Path,
    model: Path,
    known: Sequence[Known],
    engine: str = "ds-zero",
    starts: Sequence[Start] | None = None,
) -> History:
    """One history in `folder`; afterwards the run's output is that of an unbroken run.

    Raises:
        Fault: it is not, or a start hung or ended as it may not.
    """
    rows = write_rows(folder / "prompts.jsonl", seed, known)
    history = History(rows)
    for start in draw(seed, engine) if starts is None else starts:
        history.ends.append(_attempt(start, rows, folder / "broken", model))
    _attempt(Start(1, 16, 1.0, engine="accelerate"), rows, folder / "unbroken", model)
    check(folder / "broken", folder / "unbroken", rows)
    return history


def _attempt(start: Start, rows: Rows, out: Path, model: Path) -> End:
    """Starts the run, disturbs it and sees it end."""
    number = 1 + len(list(out.glob("attempts/?????.json")))
    log = out.parent / f"{out.name}-{number:05d}.log"
    mark = f"BATCHGEN_HISTORY={os.getpid()}-{time.monotonic_ns()}"
    words = f"--engine {start.engine} --dtype float32 --ranks {start.ranks} --batch-size {start.batch_size}"
    words += f" --heartbeat-seconds {start.heartbeat:.3f} {' '.join(f'--set {each}' for each in start.settings)}"
    command = [sys.executable, "-m", "batchgen", "run", str(rows.path), "-o", str(out), "--model", str(model)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict([mark.split("=")])}
    with log.open("ab") as file:
        starter = subprocess.Popen([*command, *words.split()], stdout=file, stderr=file, env=environment, cwd=ROOT)
    try:
        strokes = [] if start.kind == "none" else _disturb(start, starter, mark, out, number)
        begun = (strokes or [time.monotonic()])[-1 if start.kind == "pause one" else 0]
        last = start.kind in ("none", "pause one")
        code = await_end(starter, mark, FINISH_SECONDS if last else END_SECONDS)
        check_exit(start, code, out, number, rows)
    except Fault as fault:
        raise Fault(fault.kind, f"{start}: {fault}\n{log.read_text(errors='replace')[-3000:]}") from fault
    finally:
        for process in marked(mark):
            send(process, signal.SIGKILL, mark)
        starter.wait()
    return End(start, code, time.monotonic() - begun, bool(strokes))


def _disturb(start: Start, starter: subprocess.Popen[bytes], mark: str, out: Path, number: int) -> list[float]:
    """Waits for the moment, then strikes; gives the times of the strokes: none, where the run has ended before."""
    deadline = time.monotonic() + FINISH_SECONDS
    while not start.early and starter.poll() is None and not _works(out, number):
        if time.monotonic() > deadline:
            raise Fault("hung", f"no rank works after {FINISH_SECONDS:.0f} s")
        time.sleep(0.02)
    time.sleep(start.moment * (_LOADING_SECONDS if start.early else _WORKING_SECONDS * start.ranks))
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


def await_end(starter: subprocess.Popen[bytes], mark: str, seconds: float) -> int:
    """The exit code of `starter`, once no process of its start is left.

    Raises:
        Fault: one is left after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while starter.poll() is None or marked(mark):
        if time.monotonic() > deadline:
            raise Fault("hung", f"{len(marked(mark))} processes are left after {seconds:.0f} s")
        time.sleep(0.1)
    assert starter.returncode is not None
    return starter.returncode


def check_exit(start: Start, code: int, out: Path, number: int, rows: Rows) -> None:
    """Raises Fault if a start that was disturbed like this may not end with exit code `code`."""
    claim = out / "attempts" / f"{number:05d}.json"
    merged = (out / "generations.jsonl").exists()
    allowed = {(3 if rows.errors else 0) if merged else 75}
    if start.kind in ("none", "pause one"):
        allowed = {3 if rows.errors else 0}
    strikes_starter = start.ranks == 1 or not start.victims
    if strikes_starter and signal.SIGKILL in start.signals:
        allowed.add(-signal.SIGKILL)
    elif strikes_starter and (not claim.exists() or json.loads(claim.read_bytes())["ended"] is not None):
        # Before the claim and after its end nobody needs to answer; click says 1 to an early interrupt.
        allowed |= {-number for number in start.signals} | {1}
    if code not in allowed:
        raise Fault("exit", f"exit code {code}, not {' or '.join(map(str, sorted(allowed)))}")


def _works(out: Path, number: int) -> bool:
    paths = out.glob(f"attempts/{number:05d}-*.json")
    return any(json.loads(path.read_bytes())["state"] != "loading" for path in paths)


def main(histories: int, seed: int, engine: str) -> int:
    """Lives through `histories` of them, one after the other, and prints each and their sum; gives the exit code."""
    say = partial(print, flush=True)
    begun = time.monotonic()
    faults: list[str] = []
    ends: list[End] = []
    folder = Path(tempfile.mkdtemp(prefix="batchgen-histories-"))
    models = [(model, known_prompts(model)) for model in save_models(folder)]
    for number in range(seed, seed + histories):
        place, since = folder / str(number), time.monotonic()
        place.mkdir()
        model, known = models[number % len(models)]
        try:
            history = live(number, place, model, known, engine)
        except Fault as fault:
            faults.append(fault.kind)
            say(f"seed {number}: FAILED, all is in {place}: {fault}")
            continue
        ends += history.ends
        rows, seconds = history.rows, time.monotonic() - since
        say(f"seed {number}: {model.name}, {rows.count} rows, {len(rows.errors)} bad, {seconds:.0f} s")
        for end in history.ends:
            say(f"    {end}")
        shutil.rmtree(place)
    say(f"{histories} histories of {engine}, {len(ends)} attempts, {time.monotonic() - begun:.0f} s")
    for kind in KINDS:
        these = [end for end in ends if end.start.kind == kind]
        took = [end.seconds for end in these if end.struck]
        late = len(these) - len(took)
        say(f"    {kind}: {len(took)} (and {late} too late), ended after at most {max(took, default=0.0):.1f} s")
    lost, doubled, hung = (faults.count(kind) for kind in ("lost", "doubled", "hung"))
    say(f"rows lost {lost}, rows doubled {doubled}, hung {hung}, all faults {len(faults)}")
    if not faults:
        shutil.rmtree(folder)
    return 1 if faults else 0


if __name__ == "__main__":
    given = dict(enumerate(sys.argv[1:]))
    sys.exit(main(int(given.get(0, 30)), int(given.get(1, 1)), given.get(2, "ds-zero")))
