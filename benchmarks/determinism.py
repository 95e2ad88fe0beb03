"""How often rounding changes a text: the same rows with another dtype, batch size or engine.

    python benchmarks/determinism.py [--rows N] [--tokens N] [--engines accelerate,paged,…] [--model MODEL]

Half of the rows are greedy, half sampled (temperature 0.8, top_p 0.95, one seed). Each engine does them in float32 and
bfloat16 in batches of 1, 4 and 16; `ds-zero` and `ds-inference` in batches of 4, by one rank and by two. Counted are
the rows whose text differs, and the tokens before the first difference, as the model's tokenizer cuts the text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from batchgen import RunSettings, models, run
from batchgen.models.tokenizer import HfTokenizer

_SUBJECTS = (
    "rivers",
    "bread",
    "the moon",
    "bicycles",
    "a lighthouse",
    "honey bees",
    "old maps",
    "chess",
    "rain",
    "salt",
)
_TASKS = (
    "Explain in three sentences what one should know about {}.",
    "Write the beginning of a story about {}.",
    "Give a list of five facts about {}.",
    "Write a polite letter that asks for help with {}.",
    "Why do people like {}?",
)
_BATCHES = (1, 4, 16)
_TOGETHER = ("ds-zero", "ds-inference")


@dataclass(frozen=True)
class Way:
    """How the rows are done once."""

    engine: str
    dtype: str
    batch: int
    ranks: int = 1

    def __str__(self) -> str:
        over = f", {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{self.engine}, {self.dtype}, batch {self.batch}{over}"


def write_rows(path: Path, rows: int, tokens: int) -> None:
    """Conversations with ids; every second one sampled."""
    asked = itertools.cycle(task.format(subject) for task in _TASKS for subject in _SUBJECTS)
    with path.open("w", encoding="utf-8") as file:
        for number, text in zip(range(rows), asked, strict=False):
            sampling = {"temperature": 0.8, "top_p": 0.95, "seed": 1} if number % 2 else {}
            row = {"id": f"row-{number}", "messages": [{"role": "user", "content": text}], "max_new_tokens": tokens}
            file.write(json.dumps({**row, **sampling}) + "\n")


def ways(engines: Sequence[str]) -> Iterator[Way]:
    """All that are compared; the first of an engine is what its others are compared with."""
    for engine in engines:
        for dtype in ("float32", "bfloat16"):
            if engine in _TOGETHER:
                yield from (Way(engine, dtype, 4), Way(engine, dtype, 4, ranks=2))
            else:
                yield from (Way(engine, dtype, batch) for batch in _BATCHES)


def texts(way: Way, source: Path, out: Path, model: str | None) -> list[str]:
    """What the rows say. With one thread a rank: a sum that threads share is rounded otherwise."""
    if way.engine in _TOGETHER:  # DeepSpeed leaves things behind in a process
        words = ["run", str(source), "-o", str(out), "--engine", way.engine, "--dtype", way.dtype]
        words += ["--batch-size", str(way.batch), "--ranks", str(way.ranks), *(["--model", model] if model else [])]
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", "batchgen", *words], capture_output=True, text=True, env=variables)
        if done.returncode != 0:
            raise SystemExit(f"{way}: ended with {done.returncode}\n{done.stderr}")
    else:
        run(str(source), out, RunSettings(model=model, engine=way.engine, dtype=way.dtype, batch_size=way.batch))
    lines = (out / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def compared(one: list[str], other: list[str], tokenizer: HfTokenizer) -> str:
    """Columns of the table: of greedy and of sampled rows how many differ, and after how many tokens (median)."""
    columns = []
    for kind in (0, 1):
        pairs = list(zip(one, other, strict=True))[kind::2]
        same = [common(*tokenizer.tokenize(pair, special=False)) for pair in pairs if pair[0] != pair[1]]
        after = f"{statistics.median(same):.0f}" if same else "–"
        columns.append(f"{len(same)} of {len(pairs)} ({100 * len(same) / len(pairs):.0f} %) | {after}")
    return " | ".join(columns)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--engines", default="accelerate,paged,ds-zero,ds-inference")
    parser.add_argument("--model")
    given = parser.parse_args()
    folder = models.resolve(given.model, models.cache_folder(os.environ), print).folder
    tokenizer = HfTokenizer(str(folder))
    torch.set_num_threads(1)
    machine = f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"
    print(f"{machine}, torch {torch.__version__}, {given.rows} rows of {given.tokens} tokens")
    print("\n| compared | with | greedy rows that differ | after tokens | sampled rows that differ | after tokens |")
    print("|---|---|---|--:|---|--:|", flush=True)
    found: dict[Way, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="batchgen-determinism-") as name:
        source = Path(name) / "rows.jsonl"
        write_rows(source, given.rows, given.tokens)
        for number, way in enumerate(ways(given.engines.split(","))):
            begun = time.perf_counter()
            found[way] = texts(way, source, Path(name) / str(number), given.model)
            print(f"{way}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
            for base in bases(way, list(found)):
                print(f"| {way} | {base} | {compared(found[base], found[way], tokenizer)} |", flush=True)


def bases(way: Way, found: Sequence[Way]) -> list[Way]:
    """What `way` is compared with: the engine's first with this dtype; that one with float32's, or another engine's."""
    first = next(other for other in found if (other.engine, other.dtype) == (way.engine, way.dtype))
    if way != first:
        return [first]
    if way.dtype != "float32":
        return [next(other for other in found if other.engine == way.engine)]
    return [other for other in found if other.dtype == way.dtype and other != way][:1]


if __name__ == "__main__":
    main()
