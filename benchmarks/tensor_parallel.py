"""Tensor parallelism on GPUs: load seconds and milliseconds per token over batch sizes, weights of BLOOM-7b1's shape.

    python benchmarks/tensor_parallel.py FOLDER DTYPE [MODEL]           one GPU
    torchrun --nproc-per-node N benchmarks/tensor_parallel.py …         N of them share the model
    python benchmarks/tensor_parallel.py --compare TEXTS TEXTS          how much of the text is equal
    python benchmarks/tensor_parallel.py --products                     one matrix product, by what holds its weights

The weights are made once in FOLDER (14 GB), as benchmarks/zero.py does; MODEL is where they are read from instead,
files by rank for one. Prompts of 8 tokens, 100 new ones, greedy; a warm-up of 2 tokens, then the timed batch; loading
is told apart, with the most host memory (RssAnon) that a rank has taken for it. BATCHES and TOKENS change the cells;
with COLD=1 the weights' files are read from the disk, not from the page cache.
The texts of 64 random prompts go to FOLDER/texts-DTYPE-RANKS.json.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from memory import peaks, resident
from zero import BATCHES, cell, make_weights

from batchgen import engines
from batchgen.engine import OutOfStep, Setup
from batchgen.types import Prompt, SamplingParams
from batchgen.world import from_environment

SHAPES = ((12288, 4096), (16384, 4096), (4096, 16384), (250880, 4096))  # of BLOOM-7b1's products, [out, in]


def table(folder: Path, model: Path, dtype: str) -> None:
    """One line a batch size, until one does not fit."""
    world = from_environment(os.environ)
    say: Callable[..., None] = print if world.rank == 0 else lambda *_, **__: None
    tokens = int(os.environ.get("TOKENS", "100"))
    kind = engines.find("ds-inference")
    torch.cuda.init()
    import deepspeed  # noqa: F401 — its seconds are not the load's

    if os.environ.get("COLD") == "1" and world.rank == 0:
        forget(model)
    before, begun = resident(), time.perf_counter()
    setup = Setup(str(model), dtype, max(BATCHES), world, run=str(folder), cache=str(folder / "cache"))
    with peaks() as loading:
        made = kind(setup, engines.parse_options(kind, []))
    seconds = time.perf_counter() - begun
    with made:
        most = (loading["RssAnon"] - before["RssAnon"]) / 1e9
        say(
            f"\nds-inference, {world.size} rank(s), {dtype}: loaded in {seconds:.1f} s, {most:.2f} GB of host "
            f"memory at most, {torch.cuda.memory_allocated() / 1e9:.2f} GB on the GPU, {tokens} tokens a prompt"
        )
        say("| batch | ms per token | seconds a step | peak GB |\n|--:|--:|--:|--:|")
        for batch in BATCHES:
            try:
                cell(made, min(batch, 8), 2)
                seconds, batches = cell(made, batch, tokens)
            except (AssertionError, OutOfStep) as error:
                say(f"| {batch} | {error} | | |")
                break
            peak = max(one.peak_memory_bytes or 0 for one in batches) / 1e9
            step = seconds / tokens / len(batches)
            rows = f"{batch}" if len(batches) == 1 else f"{batch}, in {len(batches)} batches"
            say(f"| {rows} | {1000 * seconds / (batch * tokens):.3f} | {step:.4f} | {peak:.1f} |", flush=True)
        if world.rank == 0 or world.size > 1:
            write_texts(made, folder / f"texts-{dtype}-{world.size}.json", world.rank == 0)


def forget(model: Path) -> None:
    """Lets the page cache go of the files of weights."""
    for path in model.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_texts(made: Any, path: Path, writes: bool) -> None:
    """Greedy texts of 64 prompts of 4 to 40 random tokens, 32 tokens each."""
    choose = random.Random(1)
    prompts = [
        Prompt(n, str(n), n + 1, "", choose.choices(range(4, 32000), k=choose.randint(4, 40)), params, {})
        for n in range(64)
        for params in [SamplingParams(max_new_tokens=32)]
    ]
    batches = list(made.generate(iter(prompts), lambda: False))
    texts = {generation.id: generation.text for batch in batches for generation in batch.generations}
    if writes:
        path.write_text(json.dumps(texts))


def compare(one: Path, other: Path) -> None:
    """Prints the share of equal texts, and of equal tokens up to the first that differs."""
    mine, theirs = json.loads(one.read_text()), json.loads(other.read_text())
    equal = total = 0
    for name, text in mine.items():
        words, others = text.split(), theirs[name].split()
        total += len(words)
        equal += next((n for n, (a, b) in enumerate(zip(words, others, strict=False)) if a != b), len(words))
    whole = sum(text == theirs[name] for name, text in mine.items())
    distinct = len({word for text in mine.values() for word in text.split()})
    print(
        f"{one.name} and {other.name}: {whole} of {len(mine)} texts equal; {equal / total:.1%} of their tokens come "
        f"before the first that differs ({distinct} different tokens in all)"
    )


def products() -> None:
    """Microseconds of `inputs @ weight.T` in bfloat16 by what holds the weight."""
    from triton.testing import do_bench

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds, median")
    print(f"| weight | rows | {' | '.join(ways())} |\n|---|--:|{'--:|' * len(ways())}")
    for shape in SHAPES:
        weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
        held = {name: make(weight) for name, make in ways().items()}
        for rows in (1, 8, 32, 128, 512):
            inputs = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
            cells = []
            for call in held.values():
                try:
                    with torch.inference_mode():
                        cells.append(f"{1000 * do_bench(lambda: call(inputs), return_mode='median'):.0f}")  # noqa: B023
                except Exception as error:
                    cells.append(f"{type(error).__name__}")
            print(f"| {shape[0]} x {shape[1]} | {rows} | {' | '.join(cells)} |", flush=True)


def ways() -> dict[str, Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]]:
    """Makers of the product with a weight."""

    def ours(weight: torch.Tensor) -> Any:
        from batchgen.models.int8 import Int8Weight

        return Int8Weight.rounded(weight, weight.dtype).times

    def of_bitsandbytes(weight: torch.Tensor) -> Any:
        import bitsandbytes

        made = bitsandbytes.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
        made.weight = bitsandbytes.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        return made.cuda().eval()

    def of_torchao(weight: torch.Tensor) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="cuda", dtype=weight.dtype)
        made.weight.data = weight.clone()
        quantize_(made, Int8WeightOnlyConfig())
        return made

    def exact(weight: torch.Tensor) -> Any:
        return lambda inputs: torch.nn.functional.linear(inputs, weight)

    return {
        "bfloat16": exact,
        "Int8Weight": ours,
        "bitsandbytes": of_bitsandbytes,
        "torchao": of_torchao,
    }


def main(arguments: list[str]) -> None:
    """As the module says."""
    if arguments[0] == "--compare":
        return compare(Path(arguments[1]), Path(arguments[2]))
    if arguments[0] == "--products":
        return products()
    folder = Path(arguments[0])
    if not (folder / "config.json").exists():
        make_weights(folder)
    if arguments[1] != "none":
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        table(folder, Path(arguments[2]) if len(arguments) > 2 else folder, arguments[1])
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
