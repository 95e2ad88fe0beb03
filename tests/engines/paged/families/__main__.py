"""`scripts/families`: small models of well-known families through engine `paged`, beside Transformers.

A line for each family: greedy and sampled rows that are equal, the largest difference of log-probabilities, and how
often a row was preempted. Families that must be refused are refused with their sentence.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from tests.engines.paged.families import contract
from tests.engines.paged.families.dense import DENSE
from tests.engines.paged.families.mixtures import MIXTURES, REFUSED

FAMILIES = DENSE | MIXTURES

say = partial(print, flush=True)

_COUNT_HELP = (
    "how many prompts each family gets; 60 unless given. A family is also wrong if no row of it was preempted, "
    "which was seen with 8 prompts and more, and not with 2"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a family does not keep the contract."""
    parser = argparse.ArgumentParser(prog="scripts/families", description=__doc__.partition("\n\n")[0])
    parser.add_argument("families", nargs="*", metavar="PART", help="of the names of families; all unless given")
    parser.add_argument("--count", type=int, default=60, metavar="N", help=_COUNT_HELP)
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    names = [name for name in FAMILIES if not given.families or any(part in name for part in given.families)]
    if not names:
        parser.error(f"no family has any of these in its name: {', '.join(given.families)}")
    wrong = [name for name in names if not _say_outcome(name, given.count)]
    if not given.families:
        wrong += [name for name in REFUSED if not _say_refusal(name)]
    say(f"{len(names)} families, {len(wrong)} wrong{': ' if wrong else ''}{', '.join(wrong)}")
    return int(bool(wrong))


def _say_outcome(name: str, count: int) -> bool:
    """Prints the line of a family; returns whether it is as it must be."""
    since = time.monotonic()
    kind = FAMILIES[name]["model_type"]
    try:
        with tempfile.TemporaryDirectory(prefix="batchgen-families-") as folder:
            found = contract.check(FAMILIES[name], Path(folder), count)
    except Exception as error:  # a family that fails must not hide the others
        say(f"| {name} | {kind} | {type(error).__name__}: {' '.join(str(error).split())} |")
        return False
    cells = (
        f"{found.greedy} of {found.rows}",
        f"{found.sampled} of {found.rows}",
        f"{found.apart:.1e}",
        f"{found.preemptions} preemptions",
        f"{found.texts} texts",
        f"{found.ties} ties",
        f"{time.monotonic() - since:.1f} s",
    )
    wrong = found.wrong
    if not wrong and not found.preemptions:
        wrong = "no row was preempted, so that preemption was not tried: give a larger --count"
    say(f"| {name} | {kind} | {' | '.join(cells)} |{' ' if wrong else ''}{wrong}")
    return found.is_kept


def _say_refusal(name: str) -> bool:
    settings, reason = REFUSED[name]
    said = contract.find_refusal(settings)
    say(f"| {name} | {settings['model_type']} | refused: {said} |")
    return reason in said


if __name__ == "__main__":
    sys.exit(main())
