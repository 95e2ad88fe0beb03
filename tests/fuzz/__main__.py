"""Runs the cases of one kind: `scripts/fuzz [--kind KIND] [--cases N] [--seconds N] [--seed S]`."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

KINDS = {
    "conversations": "tests.fuzz.conversations",
    "folders": "tests.fuzz.folders",
    "inputs": "tests.fuzz.inputs",
}

_CASES = 100  # of one process, which is started anew after them, or if one has crashed it
_MEMORY = 8 << 30  # bytes that a process may use: a case that needs more fails
_SECONDS = 120  # that a case may take: one that takes longer hangs


def run_cases(case: Callable[[int, Path], str], first: int, most: int, until: float, folder: Path) -> int:
    """Runs seeds from `first` on in this process, until the time or their number is over; notes what it is at."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    logging.getLogger("batchgen").setLevel(logging.CRITICAL)
    for seed in range(first, first + min(most, _CASES)):
        place = folder / "case"
        place.mkdir()
        (folder / "at").write_text(str(seed))
        faulthandler.dump_traceback_later(_SECONDS, exit=True)
        try:
            outcome = case(seed, place)
        except BaseException:
            (folder / "why").write_text(traceback.format_exc())
            return 2
        faulthandler.cancel_dump_traceback_later()
        with (folder / "outcomes").open("a") as outcomes:
            outcomes.write(outcome + "\n")
        shutil.rmtree(place)
        if time.monotonic() > until:
            break
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description="Runs damaged things through batchgen.")
    parser.add_argument("--kind", choices=list(KINDS), default="inputs", help="what is damaged; inputs unless given")
    parser.add_argument("--cases", type=int, help="how many; as many as there is time for unless given")
    parser.add_argument("--seconds", type=float, help="how long; 60 unless --cases is given")
    parser.add_argument("--seed", type=int, default=1, help="the first one; 1 unless given")
    return parser.parse_args()


def main() -> int:
    given = _parse()
    case = importlib.import_module(KINDS[given.kind]).case
    folder = Path(tempfile.mkdtemp(prefix="batchgen-fuzz-"))
    seconds = given.seconds or (60 if given.cases is None else float("inf"))
    until, seed, failures = time.monotonic() + seconds, given.seed, 0
    end = sys.maxsize if given.cases is None else given.seed + given.cases
    (folder / "outcomes").touch()
    while time.monotonic() < until and seed < end:
        child = os.fork()
        if child == 0:
            os._exit(run_cases(case, seed, end - seed, until, folder))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        at = int((folder / "at").read_text())
        if code:
            failures += 1
            kept = folder / f"seed-{at}"
            (folder / "case").rename(kept)
            # A hang ends with 1, as `faulthandler` has it.
            why = (folder / "why").read_text() if code == 2 else f"the process has ended with {code}"
            _say(f"seed {at} FAILED, its files are in {kept}: {why}")
        seed = at + 1
    counts = Counter((folder / "outcomes").read_text().split("\n")[:-1])
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    _say(f"{sum(counts.values()) + failures} cases, seeds {given.seed} to {seed - 1}: {said}, {failures} FAILED")
    if not failures:
        shutil.rmtree(folder)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
