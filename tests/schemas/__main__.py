"""Rows by 300 JSON schemas through SmolLM2 at temperature 1: every text that ended by itself must be valid.

    scripts/schemas [--count N] [--seed S] [--engine NAME]...

Schemas are written by hand (`written.py`) and drawn from seeds (`draw.py`). The same rows without a constraint must not
be valid, else the proof would prove nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from batchgen.models import cache_folder, prepare_default
from tests.schemas.judge import MOST_BY_CHANCE, Schema, choose, generate, problems
from tests.schemas.written import REFUSED

ENGINES = ("paged", "accelerate")

say = partial(print, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what became of the rows with each engine, and without a constraint; gives the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/schemas", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=300, metavar="N", help="of schemas; 300 unless given")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the first that is drawn; 0 unless given")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="may be repeated; both unless given")
    given = parser.parse_args(arguments)
    model = prepare_default(cache_folder(os.environ), say)
    schemas, wrong = choose(given.count, given.seed), 0
    with tempfile.TemporaryDirectory(prefix="batchgen-schemas-") as scratch:
        for engine in given.engine or ENGINES:
            wrong += _prove(schemas, model, engine, Path(scratch))
        engine = (given.engine or ENGINES)[0]
        since = time.monotonic()
        free = generate(schemas, model, engine, _make(Path(scratch) / "free"), is_constrained=False)
    share = len(free.valid) / len(schemas)
    by_chance = f"the first object or list in the text is valid in {len(free.valid)} ({share:.0%})"
    say(f"{engine} without a constraint: {by_chance}, and not in {len(free.invalid)}; {time.monotonic() - since:.0f} s")
    if share > MOST_BY_CHANCE:
        wrong += 1
        say(f"more than {MOST_BY_CHANCE:.0%} are valid without a constraint: {', '.join(free.valid)}")
    return int(bool(wrong))


def _prove(schemas: dict[str, Schema], model: Path, engine: str, scratch: Path) -> int:
    """How many problems there are with an engine."""
    since = time.monotonic()
    outcome = generate(schemas | REFUSED, model, engine, _make(scratch / engine))
    for name in REFUSED:
        say(f"    {name}: {outcome.failed.get(name, 'not refused')}")
    found = problems(outcome)
    for problem in found:
        say(f"WRONG {problem}")
    say(
        f"{engine}: {len(schemas)} schemas: {len(outcome.valid)} rows valid, {len(outcome.invalid)} not, "
        f"{len(outcome.cut)} cut by their length, {len(outcome.failed)} refused, {len(REFUSED)} of them as they must "
        f"be; {time.monotonic() - since:.0f} s"
    )
    return len(found)


def _make(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main())
