"""How much batchgen itself costs: rows/s of `run --engine echo` beside a bare loop over the same lines, in one run.

    python benchmarks/echo.py [ROWS]

The bare loop reads, parses and writes each line; batchgen also checks ids, makes prompts, commits with fsync, and
merges in input order. Bar, at 1,000,000 rows: at least 1/8 of the bare loop's rows/s, and less than 300 MB more memory
than at 100,000.
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

_ROUNDS = 3


def write_rows(path: Path, rows: int) -> None:
    """Lines of about 120 bytes with an id and a prompt."""
    choose = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            prompt = (
                f"Write a short note about subject {number} and say why it matters to {'x' * choose.randint(1, 40)}."
            )
            file.write(json.dumps({"id": f"row-{number}", "prompt": prompt}) + "\n")


def bare_loop(source: Path, target: Path) -> float:
    """Seconds to read, parse and write every line."""
    begun = time.perf_counter()
    with source.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as file:
        for line in lines:
            json.loads(line)
            file.write(line)
    return time.perf_counter() - begun


def batchgen(source: Path, out: Path) -> tuple[float, int]:
    """Seconds of the whole command, start-up and merge included, and its peak memory in bytes."""
    return timed(command("run", source, "-o", out, "--engine", "echo"))


def command(*words: object) -> list[str]:
    """`batchgen`, on this interpreter."""
    return [sys.executable, "-m", "batchgen", *map(str, words)]


def timed(words: Sequence[str]) -> tuple[float, int]:
    """Seconds of a command, and its peak memory in bytes."""
    begun = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024


def main(rows: int) -> None:
    """Prints the ratio of the best of some rounds, and the memory at two sizes."""
    with tempfile.TemporaryDirectory(prefix="batchgen-bench-") as name:
        folder = Path(name)
        small, large = folder / "small.jsonl", folder / "large.jsonl"
        write_rows(small, rows // 10)
        write_rows(large, rows)
        bare, ours, peaks = [], [], []
        for turn in range(_ROUNDS):
            bare.append(bare_loop(large, folder / "bare"))
            seconds, peak = batchgen(large, folder / f"large-{turn}")
            ours.append(seconds)
            peaks.append(peak)
        _, small_peak = batchgen(small, folder / "small")
    growth = max(peaks) - small_peak
    print(f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} cores, {rows:,} rows")
    print(f"bare loop: {rows / min(bare):,.0f} rows/s ({', '.join(f'{seconds:.2f}' for seconds in bare)} s)")
    print(f"batchgen:  {rows / min(ours):,.0f} rows/s ({', '.join(f'{seconds:.2f}' for seconds in ours)} s)")
    print(f"ratio:     1/{min(ours) / min(bare):.2f} (bar: 1/8)")
    print(
        f"memory:    {small_peak / 1e6:.0f} MB at {rows // 10:,} rows, {growth / 1e6:+.0f} MB at {rows:,} (bar: +300)"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
