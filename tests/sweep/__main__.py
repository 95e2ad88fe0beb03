"""`scripts/sweep`: kinds of models through engines, and the table of what became of them."""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from tests.sweep.compare import ENGINES, Swept, sweep
from tests.sweep.kinds import ALL
from tests.sweep.table import PAGE, read_promised, write


def main(arguments: list[str]) -> int:
    """The exit code: 1 if a kind differs, fails or does not run as the page says, or `--engine auto` cannot choose."""
    parser = argparse.ArgumentParser(prog="scripts/sweep", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="kinds as config.json has them (model_type); all")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="one of the engines; may be repeated; all")
    parser.add_argument("--write", action="store_true", help=f"write the table, {PAGE}; takes all kinds and engines")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.kinds) - set(ALL))
    if unknown:
        parser.error(f"this version of Transformers has no kind {', '.join(unknown)} that continues a text")
    if given.write and (given.kinds or given.engine):
        parser.error("--write takes all kinds and engines")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    promised = read_promised()
    swept = []
    for kind in given.kinds or ALL:
        with tempfile.TemporaryDirectory(prefix="batchgen-sweep-") as folder:
            swept.append(sweep(kind, given.engine or ENGINES, Path(folder)))
        _say(swept[-1])
    if given.write:
        write(swept)
    ran = {(one.kind, name) for one in swept for name, outcome in one.outcomes.items() if outcome.word == "equal"}
    compared = {(one.kind, name) for one in swept for name in one.outcomes}
    for kind, name in sorted((promised & compared) - ran):
        _print(f"{kind} {name}: {PAGE} says that it runs")
    wrong = [one.kind for one in swept if one.is_wrong or any((one.kind, n) in promised - ran for n in one.outcomes)]
    _print(f"{len(swept)} kinds, {len(wrong)} wrong{': ' if wrong else ''}{', '.join(wrong)}")
    return int(bool(wrong))


def _say(one: Swept) -> None:
    if one.impossible:
        _print(f"{one.kind}: {one.impossible}")
    for name, outcome in one.outcomes.items():
        _print(f"{one.kind} {name}: {outcome.word}{': ' if outcome.detail else ''}{outcome.detail}")
    if one.chosen:
        _print(f"{one.kind} --engine auto: {one.chosen}")
    if not one.varies:
        _print(f"{one.kind}: the rows hardly differ, so that equal texts say little")


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
