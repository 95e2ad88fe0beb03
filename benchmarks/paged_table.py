"""The table of engine `paged` beside vLLM's figures: `python benchmarks/paged_table.py FOLDER`, on one GPU.

Each model in a process of its own, each job the median of three runs after a warm-up. Writes `FOLDER/figures.jsonl`,
what `benchmarks/paged.py` prints, and `FOLDER/table.md`, and prints that.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

# vLLM 0.26.0 on the same kind of card and the same jobs, measured 2026-11-23; what was to be reached first; the aim.
ROWS: list[tuple[str, str, str, float, float, float]] = [
    ("bloom-7b1", "seed:512", "ms_per_token", 0.0423, 0.040, 0.031),
    ("bloom-7b1", "seed:1", "ms_per_token", 6.27, 6.0, 5.5),
    ("bloom-7b1", "mixed", "tokens_per_second", 5964, 6500, 8000),
    ("llama-8b", "mixed", "tokens_per_second", 8951, 9500, 11500),
    ("qwen3-0.6b", "short", "tokens_per_second", 18846, 30000, 80000),
]
NAMES = {
    "seed:512": "8 and 100 tokens, batch 512",
    "seed:1": "8 and 100 tokens, batch 1",
    "mixed": "mixed job",
    "short": "short job of 8,192 rows",
}
# Of the model's own bfloat16: how much farther the log-probabilities of `paged` may be from those of float32.
TOLERANCE = 1.25
UNITS = {"ms_per_token": "ms/token", "tokens_per_second": "tokens/s"}


def measure(shape: str, jobs: list[str]) -> list[dict[str, Any]]:
    """What `benchmarks/paged.py` prints, in a process of its own."""
    script = Path(__file__).with_name("paged.py")
    environment = {name: value for name, value in os.environ.items() if name not in ("TRACE", "PROFILE", "RUNS")}
    done = subprocess.run(
        [sys.executable, str(script), shape, *jobs], check=True, text=True, stdout=subprocess.PIPE, env=environment
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line a row, and how far the tokens were from those of float32."""
    figures = {(result["shape"], result["job"]): result for result in results if "job" in result}
    lines = [
        f"{torch.cuda.get_device_name()}, {date.today().isoformat()}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, triton {version('triton')}, Python {platform.python_version()}. Random weights "
        "in bfloat16. Made by `scripts/paged-table`.",
        "",
        "| | vLLM 0.26.0 | first bar | aim | `paged` | beside vLLM | three runs, seconds |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for shape, job, unit, vllm, bar, aim in ROWS:
        result = figures[shape, job]
        value = result[unit]
        faster = vllm / value if unit == "ms_per_token" else value / vllm
        runs = ", ".join(f"{seconds:.3f}" for seconds in result["seconds"])
        cells = [f"{shape}, {NAMES[job]}, {UNITS[unit]}", *(f"{number:,g}" for number in (vllm, bar, aim))]
        lines.append("| " + " | ".join([*cells, f"{value:,.7g}", f"{faster:.2f} x", runs]) + " |")
    lines += [
        "",
        "Chosen tokens beside a float32 forward of each row alone, in standard deviations of its logits, and their "
        "log-probabilities, in nats:",
        "",
    ]
    lines += [
        "| | tokens | the best of float32 | behind it, 99 % less than | most | log-probability off, median | 99 % less "
        "than | most |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        for who in ("paged", "the model's own"):
            if who in result:
                gaps = result[who]
                cells = [f"{gaps['share that is the best']:.2%}", gaps["99 % behind less than"], gaps["most behind"]]
                cells += [gaps[f"log-probability off, {what}"] for what in ("median", "99 % less than", "most")]
                name = "`paged`" if who == "paged" else "the model's own bfloat16"
                lines.append(
                    f"| {result['shape']}, {name} | {gaps['tokens']:,} | " + " | ".join(map(str, cells)) + " |"
                )
    worst = max(ratio(result, what) for result in results if "paged" in result for what in ("median", "99 % less than"))
    lines += [
        "",
        f"The log-probabilities of `paged`, median and 99 %, are at most {worst:.3f} times as far off as those of the "
        f"model's own bfloat16 (tolerance: {TOLERANCE}).",
    ]
    return "\n".join(lines) + "\n"


def ratio(result: dict[str, Any], what: str) -> float:
    """How far off `paged` is beside the model's own bfloat16, 1: as far."""
    name = f"log-probability off, {what}"
    return float(result["paged"][name] / result["the model's own"][name])


def main() -> None:
    """Measures, writes, prints."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for shape in dict.fromkeys(row[0] for row in ROWS):
        results += measure(shape, [*(row[1] for row in ROWS if row[0] == shape), "check"])
        (folder / "figures.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    (folder / "table.md").write_text(table(results))
    print(table(results), end="")
    checks = [result for result in results if "paged" in result]
    if any(ratio(result, what) > TOLERANCE for result in checks for what in ("median", "99 % less than")):
        sys.exit("the log-probabilities are beyond the tolerance")


if __name__ == "__main__":
    main()
