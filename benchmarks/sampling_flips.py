"""How often rounding changes what is drawn from a whole vocabulary, without `top_p`, `top_k` or `min_p`.

    python benchmarks/sampling_flips.py [--draws N]
    python benchmarks/sampling_flips.py --texts [--rows N] [--tokens N] [--model MODEL]

The first prints, for several sizes of a vocabulary, the draws that differ when each logit (normal, of standard
deviation 3) is off by a normal part in a million, as sums in float32 are: by the rule of
`batchgen.generation.sampling`, and by the inverse of the cumulative distribution in the order of token ids, which was
the rule before. The second samples rows with a model in float32 at temperature 0.9, in batches of several sizes with
`accelerate` and `paged`, and prints how many texts differ from those of `accelerate` in batches of one row.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

_TEMPERATURE = 0.9
_SIZES = (1000, 32_000, 49_152, 128_256, 256_000)
_TOGETHER = 10  # draws
_WAYS = tuple((engine, batch) for engine in ("accelerate", "paged") for batch in (1, 4, 16))
_BEGINNINGS = ("The best way to", "In the year 1850,", "My neighbour said that", "A recipe for", "Nobody knows why")


def count_flips(size: int, draws: int) -> tuple[int, int]:
    """Returns how many draws differ: by the rule before, and by that of today."""
    from batchgen.generation.sampling import SamplingTensors, sample
    from batchgen.types import SamplingParams

    source = torch.Generator().manual_seed(size)
    params = SamplingTensors.of([SamplingParams(temperature=_TEMPERATURE)] * _TOGETHER, torch.device("cpu"))
    before = today = 0
    for begin in range(0, draws, _TOGETHER):
        logits = torch.randn(_TOGETHER, size, generator=source) * 3
        rounded = logits * (1 + 1e-6 * torch.randn(_TOGETHER, size, generator=source))
        uniform = torch.rand(_TOGETHER, 1, generator=source, dtype=torch.float64)
        both = [(each.double() / _TEMPERATURE).softmax(-1).cumsum(-1) for each in (logits, rounded)]
        one, other = (torch.searchsorted(sums, uniform * sums[:, -1:], right=True) for sums in both)
        before += int((one != other).sum())
        seeds, steps = torch.arange(begin, begin + _TOGETHER), torch.zeros(_TOGETHER, dtype=torch.long)
        today += int((sample(logits, seeds, steps, params) != sample(rounded, seeds, steps, params)).sum())
    return before, today


def find_texts(engine: str, batch: int, source: Path, out: Path, model: str | None) -> list[str]:
    """Returns what the model says to each row."""
    from batchgen import RunSettings, run

    run(str(source), out, RunSettings(model=model, engine=engine, dtype="float32", batch_size=batch))
    lines = (out / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def compare_texts(rows: int, tokens: int, model: str | None) -> None:
    """Prints a table of the texts that differ."""
    print(f"| {rows} texts of {tokens} tokens | texts that differ |\n|---|--:|", flush=True)
    with tempfile.TemporaryDirectory(prefix="batchgen-flips-") as name:
        source = Path(name) / "rows.jsonl"
        with source.open("w", encoding="utf-8") as file:
            for number in range(rows):
                prompt = _BEGINNINGS[number % len(_BEGINNINGS)]
                row = {"id": f"row-{number}", "prompt": prompt, "max_new_tokens": tokens, "temperature": _TEMPERATURE}
                file.write(json.dumps(row | {"ignore_eos": True}) + "\n")
        first: list[str] = []
        for engine, batch in _WAYS:
            texts = find_texts(engine, batch, source, Path(name) / f"{engine}-{batch}", model)
            first = first or texts
            differ = sum(one != other for one, other in zip(first, texts, strict=True))
            print(f"| {engine}, batch size {batch} | {differ} |", flush=True)


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--texts", action="store_true")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--model")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.texts:
        compare_texts(given.rows, given.tokens, given.model)
        return
    print(f"| vocabulary | cumulative distribution | Gumbel-max | of {given.draws} draws |\n|--:|--:|--:|---|")
    for size in _SIZES:
        before, today = count_flips(size, given.draws)
        print(f"| {size:,} | {before} | {today} | differ |", flush=True)


if __name__ == "__main__":
    main()
