"""A run of a million rows by three ranks: rows a second and memory, and what its folder's commands take.

`status`, `merge` and `report` are timed as whole commands, beside a loop in a process of its own that reads, parses and
writes the same merged lines. The rounds alternate, since other work on the machine counts for both then.

    python benchmarks/scale.py [ROWS] [RANKS]
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from echo import command, timed, write_rows

_ROUNDS = 3
_LOOP = """
import json, sys, time
begun = time.perf_counter()
with open(sys.argv[1], encoding="utf-8") as lines, open(sys.argv[2], "w", encoding="utf-8") as file:
    for line in lines:
        json.loads(line)
        file.write(line)
print(time.perf_counter() - begun)
"""


def watched(words: Sequence[str]) -> tuple[float, dict[int, int], int]:
    """Seconds of the command; the peak memory of each of its processes; the most that all had at once; in bytes.

    Looked at every 20 ms; the kernel keeps each process's own peak. Pages that several share count for each.
    """
    mark = f"BATCHGEN_SCALE={uuid.uuid4()}"
    name, _, value = mark.partition("=")
    begun = time.perf_counter()
    process = subprocess.Popen(
        words, env={**os.environ, name: value}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peaks: dict[int, int] = {}
    together = 0
    while process.poll() is None:
        sizes = [(pid, *_memory(pid)) for pid in _marked(mark)]
        for pid, _, peak in sizes:
            peaks[pid] = max(peak, peaks.get(pid, 0))
        together = max(together, sum(now for _, now, _ in sizes))
        time.sleep(0.02)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return time.perf_counter() - begun, peaks, together


def _marked(mark: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has ended, or is another user's
    return found


def _memory(pid: int) -> tuple[int, int]:
    """What process `pid` has in memory now, and at its peak; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return tuple(int(values.get(name, "0").split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def main(rows: int, ranks: int) -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory(prefix="batchgen-scale-", dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        source, out = folder / "rows.jsonl", folder / "out"
        write_rows(source, rows)
        seconds, peaks, together = watched(command("run", source, "-o", out, "--ranks", ranks, "--engine", "echo"))
        print(f"CPython {platform.python_version()}, {os.cpu_count()} cores, {rows:,} rows, {ranks} ranks")
        each = ", ".join(f"{peak / 1e6:.0f}" for peak in peaks.values())
        print(f"run      {seconds:7.2f} s  {rows / seconds:9,.0f} rows/s  {together / 1e6:,.0f} MB at once ({each})")
        loops: list[float] = []
        found: dict[str, list[tuple[float, int]]] = {"status": [], "merge": [], "report": []}
        for _ in range(_ROUNDS):
            loop = [sys.executable, "-c", _LOOP, str(out / "generations.jsonl"), str(folder / "copy")]
            loops.append(float(subprocess.run(loop, check=True, capture_output=True, text=True).stdout))
            for what, measured in found.items():
                measured.append(timed(command(what, out)))
        print(f"loop     {min(loops):7.2f} s  {rows / min(loops):9,.0f} rows/s  ({_all(loops)})")
        for what, measured in found.items():
            times = [time for time, _ in measured]
            ratio = f"{min(times) / min(loops):.2f} x the loop" + (" (bar: 4)" if what == "merge" else "")
            peak = max(size for _, size in measured)
            print(f"{what:8} {min(times):7.2f} s  {ratio:24}  {peak / 1e6:,.0f} MB  ({_all(times)})")
        print(f"page     {(out / 'report.html').stat().st_size / 1e6:.1f} MB")


def _all(times: Sequence[float]) -> str:
    return ", ".join(f"{time:.2f}" for time in times)


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    main(given[0] if given else 1_000_000, given[1] if len(given) > 1 else 3)
