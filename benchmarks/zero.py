"""ZeRO streams on one GPU: milliseconds per token over batch sizes, random weights of BLOOM-7b1's shape.

    python benchmarks/zero.py FOLDER none|cpu|nvme=PATH|accelerate [NAME=VALUE …]

One way a process; the rest are settings of the engine. `accelerate` is that engine on the same weights, to compare
with. BATCHES and TOKENS in the environment change the table's cells; BATCHES=0 gives the engine 8,192 prompts and lets
it choose.

The weights are made once in FOLDER (14 GB). Prompts of 8 tokens; greedy; the tokens of each cell are in the table. One
warm-up of 2 tokens, then the timed batch; loading is told apart. With offload, a step cannot take less time than the
weights need to cross from where they lie: the share of that bound is the engine's own figure for the batch.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from batchgen import engines
from batchgen.engine import OutOfStep, Setup
from batchgen.types import Batch, Prompt, SamplingParams
from batchgen.world import World

SHAPE = {
    "model_type": "bloom",
    "n_layer": 30,
    "hidden_size": 4096,
    "n_head": 32,
    "vocab_size": 250880,
    "torch_dtype": "bfloat16",
    "eos_token_id": None,
    "bos_token_id": None,
}
PROMPT_TOKENS = 8
BATCHES = [int(size) for size in os.environ.get("BATCHES", "1,8,32,128,256,512").split(",")]


def make_weights(folder: Path) -> None:
    """Random weights of the shape, sharded files as the hub has them, and a tokenizer that nobody asks for words."""
    config = AutoConfig.for_model(**SHAPE)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(SHAPE["vocab_size"])}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w3").save_pretrained(folder)
    del model
    gc.collect()
    torch.cuda.empty_cache()


def copy_bandwidth() -> float:
    """Bytes/s from pinned host memory to the GPU, best of five copies of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, source.numel() / (time.perf_counter() - begun))
    return best


def prompts(count: int, tokens: int) -> list[Prompt]:
    """`count` prompts that generate exactly `tokens` tokens each: the shape has no end of sequence."""
    ids = list(range(10, 10 + PROMPT_TOKENS))
    return [Prompt(n, str(n), n + 1, "", ids, SamplingParams(max_new_tokens=tokens), {}) for n in range(count)]


def cell(made: Any, batch: int, tokens: int) -> tuple[float, list[Batch]]:
    """Seconds for `batch` prompts of `tokens` tokens, and the batches they came in."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    batches = list(made.generate(iter(prompts(batch, tokens)), lambda: False))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    generations = [generation for one in batches for generation in one.generations]
    assert sum(generation.generated_tokens for generation in generations) == batch * tokens, "not all was generated"
    return seconds, batches


def table(folder: Path, offload: str, settings: list[str]) -> None:
    """One engine, one line a batch size, until one does not fit."""
    name, options = ("ds-zero", settings + ([] if offload == "none" else [f"offload={offload}"]))
    if offload == "accelerate":
        name, options = "accelerate", []
    kind = engines.find(name)
    tokens = int(os.environ.get("TOKENS", "100" if offload in ("none", "accelerate") else "8"))
    chosen = None if BATCHES == [0] else max(BATCHES)
    begun = time.perf_counter()
    setup = Setup(str(folder), "bfloat16", chosen, World(), run=str(folder), cache=str(folder / "cache"))
    with kind(setup, engines.parse_options(kind, options)) as made:
        print(f"\n{name} {' '.join(options)}: loaded in {time.perf_counter() - begun:.1f} s, {tokens} tokens a prompt")
        print("| batch | ms per token | seconds a step | share of the bound | peak GB |\n|--:|--:|--:|--:|--:|")
        for batch in BATCHES:
            try:
                cell(made, min(batch or 8, 8), 2)
                seconds, batches = cell(made, batch or 8192, tokens)
            except (AssertionError, OutOfStep) as error:
                print(f"| {batch} | {error} | | | |")
                return
            rows, share = len(batches[0].generations), batches[0].share_of_bound
            peak = max(one.peak_memory_bytes for one in batches) / 1e9
            step = seconds / tokens / len(batches)
            print(
                f"| {rows}{'' if rows == batch else ', chosen'} | {1000 * seconds / ((batch or 8192) * tokens):.3f} | "
                f"{step:.4f} | {share or ''} | {peak:.1f} |",
                flush=True,
            )


def main(folder: Path, offload: str, settings: list[str]) -> None:
    """Makes the weights, then the table."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if not (folder / "config.json").exists():
        begun = time.perf_counter()
        make_weights(folder)
        print(f"made the weights in {time.perf_counter() - begun:.1f} s")
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"weights {weights / 1e9:.2f} GB, pinned host to GPU {copy_bandwidth() / 1e9:.1f} GB/s")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("batchgen").setLevel(logging.INFO)
    table(folder, offload, settings)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
