"""From the command to the first tokens: `python benchmarks/startup.py SHAPE [ENGINE]`, on a GPU.

Makes real weight files of the shape (random numbers), which are in the page cache then, and runs `batchgen run` twice
on eight prompts for one token each: first with empty caches of compiled kernels, then as every later run finds them.
What is timed is the whole command, the output files included. The lines that the run says on the way are printed with
their times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from batchgen.models import loading, random_weights, shapes


def weights(shape: str, folder: Path) -> int:
    """Files of that shape's weights; their bytes."""
    shapes.make(shape, torch.bfloat16, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = loading.load(str(folder), {"dtype": torch.bfloat16, "device_map": {"": device}})
    for hollow in [*folder.glob("*.safetensors*"), folder / random_weights.HOLLOW]:
        hollow.unlink(missing_ok=True)
    model.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def run(folder: Path, engine: str, caches: Path) -> tuple[float, list[tuple[float, str]]]:
    """Seconds of a run, and what it said when."""
    inputs, out = folder.parent / "prompts.jsonl", tempfile.mkdtemp() + "/run"
    inputs.write_text("".join(json.dumps({"prompt": "a b c " * (number + 1)}) + "\n" for number in range(8)))
    words = ["run", str(inputs), "-o", out, "--model", str(folder), "--engine", engine, "--max-new-tokens", "1"]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(caches), "TRITON_CACHE_DIR": str(caches / "triton")}
    begun = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "batchgen", *words], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        said = [(time.perf_counter() - begun, line.strip()) for line in process.stderr]
    if process.returncode:
        sys.exit("\n".join(line for _, line in said))
    return time.perf_counter() - begun, said


def main() -> None:
    """Prints a JSON line a run."""
    shape, engine, *_ = [*sys.argv[1:], "paged"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        size = weights(shape, folder)
        for caches in ("empty", "filled"):
            seconds, said = run(folder, engine, Path(scratch, "caches"))
            figures = {"shape": shape, "engine": engine, "weights_GB": round(size / 1e9, 2), "caches": caches}
            print(json.dumps({**figures, "seconds": round(seconds, 1)}), flush=True)
            for when, line in said:
                print(f"  {when:5.1f} s  {line}", flush=True)


if __name__ == "__main__":
    main()
