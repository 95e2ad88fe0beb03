"""Histories of runs that are struck by faults of every kind; then the proof of exactly once, and the totals.

    scripts/chaos [--histories N | --each N] [--seed S] [--engine NAME] [--plant FAULT]

Each seed draws a prompt file, up to four starts of a run over it with what strikes them, and what befalls its folder
between them; one undisturbed start finishes. A history that fails is printed with its seed, and its folder is kept.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.chaos.checker import Fault
from tests.chaos.draw import ENGINES, KINDS, Harm, Start, deal, draw, engine_of
from tests.chaos.history import Ground, History, live
from tests.chaos.plants import PLANTS, plant
from tests.chaos.starts import ROOT

say = partial(print, flush=True)


@dataclass
class Totals:
    """What has been drawn and lived through so far."""

    drawn: Counter[str] = field(default_factory=Counter)  # kinds of faults
    engines: Counter[str] = field(default_factory=Counter)
    lived: list[History] = field(default_factory=list)
    wrong: list[Fault] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Lives through the histories, one after the other; prints each and their sum; gives the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--histories", type=int, default=200, metavar="N")
    parser.add_argument(
        "--each", type=int, metavar="N", help="instead, few histories of echo with every kind of fault N times"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the first one; the others follow")
    parser.add_argument("--engine", choices=ENGINES, help="all of them in turn, unless given")
    parser.add_argument("--plant", choices=PLANTS, help="into a copy of batchgen, which must then fail")
    asked = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="batchgen-chaos-"))
    ground, begun, totals = Ground(folder), time.monotonic(), Totals()
    product = plant(asked.plant, folder / "planted") if asked.plant else ROOT
    try:
        for seed, engine, steps in _drawn(asked):
            place = folder / str(seed)
            place.mkdir()
            try:
                _live(seed, engine, steps, place, ground, product, totals)
            except Fault as fault:
                totals.wrong.append(fault)
                say(f"seed {seed}, {engine}: FAILED, all is in {place}: {str(fault)[:8000]}")
            else:
                shutil.rmtree(place)
                ground.forget(seed, engine)
            totals.engines[engine] += 1
            totals.drawn.update(step.kind for step in steps if step.kind != "none")
    except (KeyboardInterrupt, SystemExit):
        say("stopped early: the history under way is not counted")
    _sum_up(totals, time.monotonic() - begun)
    if not totals.wrong:
        shutil.rmtree(folder)
    return 1 if totals.wrong else 0


def _drawn(asked: argparse.Namespace) -> list[tuple[int, str, Sequence[Start | Harm]]]:
    """Seed, engine and steps of each history."""
    if asked.each is not None:
        return [(asked.seed + number, "echo", steps) for number, steps in enumerate(deal(asked.seed, asked.each))]
    seeds = range(asked.seed, asked.seed + asked.histories)
    engines = [asked.engine or engine_of(seed) for seed in seeds]
    return [(seed, engine, draw(seed, engine)) for seed, engine in zip(seeds, engines, strict=True)]


def _live(
    seed: int, engine: str, steps: Sequence[Start | Harm], place: Path, ground: Ground, product: Path, totals: Totals
) -> None:
    since = time.monotonic()
    history = live(seed, engine, place, ground, steps, product)
    totals.lived.append(history)
    rows, seconds = history.rows, time.monotonic() - since
    say(f"seed {seed}, {engine}: {rows.count} rows, {len(rows.errors)} bad, {seconds:.0f} s")
    for step in history.steps:
        say(f"    {step}")


def _sum_up(totals: Totals, seconds: float) -> None:
    lived, wrong = totals.lived, totals.wrong
    faults = Counter(fault for history in lived for fault in history.faults)
    took: dict[str, float] = {}
    for end in (end for history in lived for end in history.ends if end.struck):
        took[end.start.kind] = max(end.seconds, took.get(end.start.kind, 0.0))
    which = ", ".join(f"{name} {totals.engines[name]}" for name in ENGINES if totals.engines[name])
    say(f"histories {totals.engines.total()} ({which}), {seconds:.0f} s")
    for kind in KINDS:
        ended = f", ended after at most {took[kind]:.1f} s" if kind in took else ""
        say(f"    {kind}: drawn {totals.drawn[kind]}, struck {faults[kind]}{ended}")
    starts = sum(len(history.ends) for history in lived)
    rows = sum(history.rows.count for history in lived)
    say(f"faults injected {faults.total()}, starts {starts}, rows {rows}")
    lost, doubled = (sum(fault.rows for fault in wrong if fault.kind == kind) for kind in ("lost", "doubled"))
    kinds = Counter(fault.kind for fault in wrong)
    others = len(wrong) - kinds["lost"] - kinds["doubled"] - kinds["hung"]
    say(f"rows lost {lost}, rows doubled {doubled}, histories hung {kinds['hung']}, wrong otherwise {others}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process and no mount is left
    sys.exit(main())
