"""The kernels that choose tokens beside the same in torch: `python -m tests.generation.kernel_cases [cuda]`.

On a GPU, or, where Triton is told to interpret them, on the CPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from batchgen.generation import edit_kernel, edits, random_numbers, sampling, sampling_kernel
from batchgen.generation.edits import EditTensors
from batchgen.generation.sampling import SamplingTensors

# Temperature, top-k, top-p, min-p: each alone, together, and at the ends of their ranges.
_PARAMS = (
    (1.0, 0, 1.0, 0.0),
    (0.8, 0, 0.95, 0.0),
    (1.3, 10, 0.9, 0.0),
    (0.5, 3, 1.0, 0.0),
    (1.0, 0, 1.0, 0.2),
    (1.5, 40, 0.7, 0.05),
    (1.0, 0, 0.1, 0.0),
    (1e-40, 0, 0.9, 0.0),
    (2.0, 100_000, 0.5, 0.0),
)
_ROWS = [0, 1, 3, 5, 7]


def draws(device: str) -> Iterator[tuple[str, bool]]:
    """Each case in words, and whether every row draws the same token as in torch."""
    source = torch.Generator().manual_seed(1)
    # The interpreter takes a tenth of a second for a row.
    sizes, spreads, dtypes = (50, 5000), (0.5, 3), (torch.float32, torch.bfloat16)
    if device == "cuda":
        sizes, spreads, dtypes = (50, 5000, 130_000), (0.5, 3, 20), (*dtypes, torch.float16)
    for size, dtype, spread in itertools.product(sizes, dtypes, spreads):
        logits = (torch.randn(8, size, generator=source) * spread).to(dtype)
        logits[:, ::7] = -torch.inf
        logits[1, ::3] = logits[1, 1]  # many that are equal
        rows = torch.tensor(_ROWS)
        seeds = torch.randint(-(2**63), 2**63 - 1, (len(_ROWS),), generator=source)
        steps = torch.randint(0, 3000, (len(_ROWS),), generator=source)
        for temperature, top_k, top_p, min_p in _PARAMS:
            each = [torch.full((len(_ROWS),), value, dtype=torch.float64) for value in (temperature, top_p, min_p)]
            params = SamplingTensors(
                each[0],
                torch.full((len(_ROWS),), top_k),
                top_k,
                each[1] if top_p < 1 else None,
                each[2] if min_p > 0 else None,
            )
            expected = sampling.sample(logits[rows], seeds, steps, params)
            there = SamplingTensors(
                *(each.to(device) if isinstance(each, torch.Tensor) else each for each in _values(params))
            )
            numbers = (each.to(device) for each in (rows, seeds, steps))
            drawn = sampling_kernel.sample(logits.to(device), *numbers, there)
            what = f"draws: {size} tokens, {dtype}, spread {spread}, {(temperature, top_k, top_p, min_p)}"
            yield f"{what}: {drawn.tolist()}, not {expected.tolist()}", torch.equal(drawn.cpu(), expected)


def _values(record: SamplingTensors | EditTensors) -> list[Any]:
    return [getattr(record, field.name) for field in dataclasses.fields(record)]


@triton.jit
def _store_words(seeds, steps, words, COUNT: tl.constexpr):
    row = tl.program_id(0)
    lane = tl.arange(0, COUNT)
    nothing = lane * 0
    step = nothing + tl.load(steps + row).to(tl.int32)
    four = tl.philox(tl.load(seeds + row), lane, nothing, step, nothing)
    for number in tl.static_range(4):
        tl.store(words + (row * 4 + number) * COUNT + lane, four[number].to(tl.int64))


def words(device: str) -> Iterator[tuple[str, bool]]:
    """As `draws`, of the random words; the kernel of `sampling_kernel` takes Triton's as this one does."""
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF, -0x123456789ABCDEF])
    steps = torch.tensor([0, 1, 2**31 - 1, 2, 77, 4095])
    got = torch.zeros(len(seeds), 4096, dtype=torch.long, device=device)
    _store_words[(len(seeds),)](seeds.to(device), steps.to(device), got, COUNT=1024)
    expected = random_numbers.find_all_words(seeds, steps, 4096)
    for row, seed in enumerate(seeds.tolist()):
        yield f"words: seed {seed}, step {steps[row]}", torch.equal(got[row].cpu(), expected[row])


def edited(device: str) -> Iterator[tuple[str, bool]]:
    """As `draws`, of penalties and biases."""
    source = torch.Generator().manual_seed(2)
    for size, has_seen, has_bias in itertools.product((50, 4096, 9001), (False, True), (False, True)):
        logits = torch.randn(5, size, generator=source)
        logits[:, ::5] = -torch.inf
        seen = torch.randint(0, 7, (8, size), generator=source).to(torch.int16)
        bias = torch.randn(6, size, generator=source)
        bias[:, ::9] = -torch.inf
        penalties = torch.rand(3, 5, generator=source) + 0.5
        rows = torch.tensor([[7, 1, 2, 0, 3], [0, 5, 1, 2, 3]])

        on_cpu = EditTensors(seen if has_seen else None, rows[0], *penalties, bias if has_bias else None, rows[1])
        there = EditTensors(*(None if each is None else each.to(device) for each in _values(on_cpu)))
        expected = logits.clone()
        edits.edit_logits(expected, on_cpu)
        got = logits.to(device, copy=True)
        edit_kernel.edit_logits(got, there)
        off = (got.cpu() - expected).nan_to_num(0.0, posinf=torch.inf, neginf=torch.inf).abs().max()
        yield f"edits: {size} tokens, seen {has_seen}, bias {has_bias}: off by {off}", bool(off < 1e-5)


def masked(device: str) -> Iterator[tuple[str, bool]]:
    """As `draws`, of masks; one is narrower than the vocabulary."""
    source = torch.Generator().manual_seed(3)
    for size, dtype in itertools.product((50, 4096, 9001), (torch.float32, torch.bfloat16)):
        logits = torch.randn(5, size, generator=source).to(dtype)
        words = max(1, -(-size // 32) - 1)
        bits = torch.randint(-(2**31), 2**31 - 1, (5, words), generator=source).to(torch.int32)
        expected = logits.clone()
        edits.apply_bitmask(expected, bits)
        got = logits.to(device, copy=True)
        edit_kernel.apply_bitmask(got, bits.to(device))
        yield f"masks: {size} tokens, {dtype}", torch.equal(got.cpu(), expected)


def main(device: str) -> int:
    """Tries all cases; how many are wrong stands in the last line."""
    cases = itertools.chain(words(device), draws(device), edited(device), masked(device))
    wrong = [what for what, is_right in cases if not is_right]
    sys.stdout.write("".join(f"{line}\n" for line in (*wrong, f"{len(wrong)} wrong")))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cpu"))
