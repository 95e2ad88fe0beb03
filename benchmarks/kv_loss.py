"""What a KV cache of 8 bits loses: `python benchmarks/kv_loss.py [--model MODEL] [--texts N] [--tokens N] [FILE]`.

Text of FILE (the manual's pages, unless it is given) is cut into pieces, and the model is asked for each next token of
each piece, by its own numbers and over keys and values as `--kv-dtype fp8` keeps them. Printed are the share of places
where the most probable token is the same, the mean and the largest difference of the text's log-probabilities, and the
perplexity of both; for scale, the same of a model in bfloat16 beside one in float32. Rounding is that of the engine,
in one forward for each piece, so that a difference does not lead to others.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from batchgen.engines.paged import models as paged_models
from batchgen.engines.paged.alone import Alone
from batchgen.engines.paged.layout import round_as_cache
from batchgen.models import cache_folder, loading, resolve
from batchgen.models.tokenizer import HfTokenizer

_ROOT = Path(__file__).parents[1]


class Scores(NamedTuple):
    """What a model says of the next token at each place of a text."""

    best: torch.Tensor  # [places]
    logprobs: torch.Tensor  # [places], of the text's own tokens


def score(model: Any, piece: list[int], kv_dtype: str) -> Scores:
    """By one forward over `piece`."""
    ids = torch.tensor([piece])
    with torch.inference_mode(), round_as_cache(kv_dtype):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1].float()
    return Scores(logits.argmax(-1), logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])


def score_all(folder: Path, dtype: torch.dtype, pieces: list[list[int]], kv_dtypes: list[str]) -> list[Scores]:
    """The scores of all pieces with each type of the cache, of the model in `dtype`."""
    model = loading.load(str(folder), {"dtype": dtype, "device_map": {"": "cpu"}})
    paged_models.patch(model, Alone())
    found = []
    for kv_dtype in kv_dtypes:
        of_pieces = [score(model, piece, kv_dtype) for piece in pieces]
        found.append(Scores(*(torch.cat(parts) for parts in zip(*of_pieces, strict=True))))
    return found


def describe(name: str, usual: Scores, other: Scores) -> str:
    """A row of the table."""
    apart = (other.logprobs - usual.logprobs).abs()
    same = (usual.best == other.best).double().mean()
    perplexities = (math.exp(-scores.logprobs.double().mean()) for scores in (usual, other))
    before, after = (f"{perplexity:.4f}" for perplexity in perplexities)
    return f"| {name} | {same:.2%} | {apart.mean():.4f} | {apart.max():.2f} | {before} | {after} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    given = parser.parse_args()
    folder = resolve(given.model, cache_folder(os.environ), print).folder
    files = [Path(given.file)] if given.file else sorted((_ROOT / "docs").glob("*.md"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    tokens = list(HfTokenizer(str(folder)).tokenize([text], special=False)[0])
    step = max(given.tokens, len(tokens) // given.texts)
    pieces = [tokens[begin : begin + given.tokens] for begin in range(0, len(tokens) - given.tokens + 1, step)]
    pieces = pieces[: given.texts]
    wide, wide_rounded = score_all(folder, torch.float32, pieces, ["auto", "fp8"])
    narrow, narrow_rounded = score_all(folder, torch.bfloat16, pieces, ["auto", "fp8"])
    print(f"{len(pieces)} texts of {given.tokens} tokens, {folder.name}\n")
    print("| | same best token | mean difference of a log-probability | largest | perplexity | |")
    print("|---|--:|--:|--:|--:|--:|")
    print(describe("float32, cache of 8 bits beside 32", wide, wide_rounded))
    print(describe("bfloat16, cache of 8 bits beside 16", narrow, narrow_rounded))
    print(describe("bfloat16 beside float32", wide, narrow))


if __name__ == "__main__":
    main()
