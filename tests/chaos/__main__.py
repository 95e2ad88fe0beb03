"""Histories of runs that are struck by faults of every kind; then the proof of exactly once, and the totals.

    scripts/chaos [--histories N] [--seed S] [--engine NAME] [--plant FAULT]

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
from functools import partial
from pathlib import Path

from tests.chaos.checker import Fault
from tests.chaos.draw import ENGINES, HARMS, REFUSED, STRIKES, engine_of
from tests.chaos.history import Ground, History, live
from tests.chaos.plants import PLANTS, plant
from tests.chaos.starts import ROOT


def main() -> int:
    """Lives through the histories, one after the other; prints each and their sum; gives the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--histories", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the first one; the others follow")
    parser.add_argument("--engine", choices=ENGINES, help="all of them in turn, unless given")
    parser.add_argument("--plant", choices=PLANTS, help="into a copy of batchgen, which must then fail")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process and no mount is left
    say = partial(print, flush=True)
    folder = Path(tempfile.mkdtemp(prefix="batchgen-chaos-"))
    ground, begun = Ground(folder), time.monotonic()
    product = plant(asked.plant, folder / "planted") if asked.plant else ROOT
    lived: list[History] = []
    wrong: list[Fault] = []
    for seed in range(asked.seed, asked.seed + asked.histories):
        place, since = folder / str(seed), time.monotonic()
        place.mkdir()
        engine = asked.engine or engine_of(seed)
        try:
            history = live(seed, engine, place, ground, product=product)
        except Fault as fault:
            wrong.append(fault)
            say(f"seed {seed}, {engine}: FAILED, all is in {place}: {str(fault)[:8000]}")
            continue
        lived.append(history)
        seconds = time.monotonic() - since
        say(f"seed {seed}, {engine}: {history.rows.count} rows, {len(history.rows.errors)} bad, {seconds:.0f} s")
        for step in history.steps:
            say(f"    {step}")
        shutil.rmtree(place)
        ground.forget(seed, engine)
    _sum_up(lived, wrong, time.monotonic() - begun)
    if not wrong:
        shutil.rmtree(folder)
    return 1 if wrong else 0


def _sum_up(lived: list[History], wrong: list[Fault], seconds: float) -> None:
    engines = Counter(history.engine for history in lived)
    faults = Counter(fault for history in lived for fault in history.faults)
    took: dict[str, float] = {}
    for end in (end for history in lived for end in history.ends if end.struck):
        took[end.start.kind] = max(end.seconds, took.get(end.start.kind, 0.0))
    which = ", ".join(f"{name} {engines[name]}" for name in ENGINES if engines[name])
    print(f"histories {len(lived) + len(wrong)} ({which}), {seconds:.0f} s")
    for kind in dict.fromkeys((*STRIKES, *HARMS, *REFUSED)):
        ended = f", ended after at most {took[kind]:.1f} s" if kind in took else ""
        print(f"    {kind}: {faults[kind]}{ended}")
    starts = sum(len(history.ends) for history in lived)
    rows = sum(history.rows.count for history in lived)
    print(f"faults injected {faults.total()}, starts {starts}, rows {rows}")
    lost, doubled = (sum(fault.rows for fault in wrong if fault.kind == kind) for kind in ("lost", "doubled"))
    kinds = Counter(fault.kind for fault in wrong)
    others = len(wrong) - kinds["lost"] - kinds["doubled"] - kinds["hung"]
    print(f"rows lost {lost}, rows doubled {doubled}, histories hung {kinds['hung']}, wrong otherwise {others}")


if __name__ == "__main__":
    sys.exit(main())
