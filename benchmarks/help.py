"""Time of `batchgen --help` beside that of importing click, in one run. Bar: at most 3 times.

python benchmarks/help.py
"""

from __future__ import annotations

import subprocess
import sys
import time

_ROUNDS = 15


def seconds(*arguments: str) -> float:
    """Of one process."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun


def main() -> None:
    """Prints the ratio of the best of some rounds, taken in turn."""
    click, ours = [], []
    for _ in range(_ROUNDS):
        click.append(seconds("-c", "import click"))
        ours.append(seconds("-m", "batchgen", "--help"))
    print(f"import click: {1000 * min(click):.0f} ms, batchgen --help: {1000 * min(ours):.0f} ms")
    print(f"ratio: {min(ours) / min(click):.2f} (bar: 3)")


if __name__ == "__main__":
    main()
