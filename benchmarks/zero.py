"""ZeRO streams on one GPU: milliseconds per token over batch sizes, random weights of BLOOM-7b1's shape.

    python benchmarks/zero.py FOLDER none|cpu|nvme=PATH|accelerate [NAME=VALUE …]

One way a process; the rest are settings of the engine. `accelerate` is that engine on the same weights, to compare
with. BATCHES and TOKENS in the environment change the table's cells.

The weights are made once in FOLDER (14 GB). Prompts of 8 tokens; greedy; the tokens of each cell are in the table. One
warm-up of 2 tokens, then the timed batch; loading is told apart. With offload, a step cannot take less time than the
weights need to cross from where they lie: the share of that bound is the last column.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from batchgen import engine
from batchgen.engine import Setup
from batchgen.types import Prompt, SamplingParams
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
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(1000)}, unk_token="w0"))
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


def cell(made: Any, batch: int, tokens: int) -> float:
    """Seconds for `batch` prompts of `tokens` tokens, in one batch."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    batches = list(made.generate(iter(prompts(batch, tokens)), lambda: False))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    assert len(batches) == 1, "the batch was split"
    assert sum(generation.generated_tokens for generation in batches[0].generations) == batch * tokens
    return seconds


def table(folder: Path, offload: str, settings: list[str], weights: int, bandwidth: float) -> None:
    """One engine, one line a batch size, until one does not fit."""
    name, options = ("ds-zero", settings + ([] if offload == "none" else [f"offload={offload}"]))
    if offload == "accelerate":
        name, options = "accelerate", []
    kind = engine.find(name)
    tokens = int(os.environ.get("TOKENS", "100" if offload in ("none", "accelerate") else "8"))
    begun = time.perf_counter()
    with kind(Setup(str(folder), "bfloat16", 512, World()), engine.parse_options(kind, options)) as made:
        print(f"\n{name} {' '.join(options)}: loaded in {time.perf_counter() - begun:.1f} s, {tokens} tokens a prompt")
        print("| batch | ms per token | seconds a step | share of the bound |\n|--:|--:|--:|--:|")
        for batch in BATCHES:
            try:
                cell(made, batch, 2)
                seconds = cell(made, batch, tokens)
            except AssertionError as error:
                print(f"| {batch} | {error} | | |")
                return
            bound = weights / bandwidth if offload == "cpu" else 0.0
            share = f"{bound * tokens / seconds:.0%}" if bound else ""
            step = seconds / tokens
            print(f"| {batch} | {1000 * seconds / (batch * tokens):.3f} | {step:.4f} | {share} |", flush=True)


def main(folder: Path, offload: str, settings: list[str]) -> None:
    """Makes the weights, then the table."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if not (folder / "config.json").exists():
        begun = time.perf_counter()
        make_weights(folder)
        print(f"made the weights in {time.perf_counter() - begun:.1f} s")
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    bandwidth = copy_bandwidth()
    print(f"weights {weights / 1e9:.2f} GB, pinned host to GPU {bandwidth / 1e9:.1f} GB/s")
    table(folder, offload, settings, weights, bandwidth)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
