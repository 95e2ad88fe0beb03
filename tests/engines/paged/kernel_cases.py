"""The kernels of `paged` beside float64: `python -m tests.engines.paged.kernel_cases [cuda]`.

On a GPU, or, where Triton is told to interpret them, on the CPU. Outputs are poisoned before they are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from tests.engines.paged.attention_cases import (
    FEATURES,
    TOLERANCES,
    Features,
    Heads,
    case,
    find_kernel_errors,
    poisoned,
    with_broken_key,
    with_broken_token,
    with_rounded_cache,
    with_stale_cache,
)
from tests.kernels import say_cases

# The interpreter has no bfloat16, and takes seconds for a case.
INTERPRETED = [(heads, torch.float32, of) for heads in (Heads(6, 2, 16, 16), Heads(4, 2, 40, 24)) for of in FEATURES]
# The attention of models that people run, with their heads and features; long windows are cut short.
_MODELS = {
    "Gemma 2": (Heads(8, 4, 256, 256), Features(softcap=50.0)),
    "Gemma 2, window": (Heads(8, 4, 256, 256), Features(window=300, softcap=50.0)),
    "Gemma 3": (Heads(16, 8, 256, 256), Features(window=1024)),
    "gpt-oss": (Heads(64, 8, 64, 64), Features(sinks=True)),
    "gpt-oss, window": (Heads(64, 8, 64, 64), Features(window=128, sinks=True)),
    "DeepSeek V2-Lite": (Heads(16, 16, 192, 128), Features()),
    "Phi-3-mini": (Heads(32, 32, 96, 96), Features()),
    "Phi-3-mini, window": (Heads(32, 32, 96, 96), Features(window=263)),
}
# The compiler takes seconds for a case, so that few kinds of heads have all features.
_FEW = (FEATURES[0], FEATURES[3], FEATURES[-1])
_GPU_HEADS = {
    (Heads(9, 3, 80, 80), torch.bfloat16): FEATURES,
    (Heads(9, 3, 80, 80), torch.float32): FEATURES,
    (Heads(4, 4, 64, 64), torch.bfloat16): _FEW,
    (Heads(32, 8, 128, 128), torch.bfloat16): _FEW,
    (Heads(32, 8, 128, 128), torch.float16): _FEW,
    (Heads(17, 1, 256, 256), torch.bfloat16): _FEW,
    (Heads(16, 16, 192, 128), torch.bfloat16): _FEW,
    (Heads(4, 2, 8, 8), torch.float32): _FEW,
    (Heads(4, 2, 40, 24), torch.float32): _FEW,
}
COMPILED = [
    *((heads, torch.bfloat16, features) for heads, features in _MODELS.values()),
    *((heads, dtype, features) for (heads, dtype), kinds in _GPU_HEADS.items() for features in kinds),
]
CASES = [*INTERPRETED, *COMPILED]
# Over a cache of 8 bits.
ROUNDED_INTERPRETED = [
    *(INTERPRETED[number] for number in (3, 9, 15, 17)),
    (Heads(6, 2, 16, 16), torch.float16, FEATURES[1]),  # whose products are of other numbers than those of float32
    (Heads(6, 2, 24, 16), torch.float16, FEATURES[0]),
]
ROUNDED_COMPILED = [
    *((Heads(9, 3, 80, 80), dtype, features) for dtype in (torch.bfloat16, torch.float32) for features in _FEW),
    *((Heads(32, 8, 128, 128), dtype, features) for dtype in (torch.bfloat16, torch.float16) for features in _FEW),
    *((heads, torch.bfloat16, features) for heads, features in _MODELS.values()),
    (Heads(4, 4, 64, 64), torch.bfloat16, FEATURES[0]),
    (Heads(32, 32, 128, 128), torch.bfloat16, FEATURES[1]),
    (Heads(4, 2, 40, 24), torch.float32, FEATURES[8]),
]


def attentions(device: str) -> Iterator[tuple[str, bool]]:
    """Each case in words, and whether it is right."""
    yield from _attend(device, COMPILED if device == "cuda" else INTERPRETED, is_rounded=False)


def rounded_attentions(device: str) -> Iterator[tuple[str, bool]]:
    """As `attentions`, over caches of 8 bits, whose numbers and scales must be those of attention in torch."""
    yield from _attend(device, ROUNDED_COMPILED if device == "cuda" else ROUNDED_INTERPRETED, is_rounded=True)


def _attend(
    device: str, cases: Sequence[tuple[Heads, torch.dtype, Features]], *, is_rounded: bool
) -> Iterator[tuple[str, bool]]:
    for number, (heads, dtype, features) in enumerate(cases):
        of = case(heads, dtype, features, seed=number)
        of = with_stale_cache(with_rounded_cache(of) if is_rounded else of)
        splits = 1 if number % 2 else 4  # FEATURES are odd in number, and follow each other: each has both
        if splits == 1:  # a token in the middle of a block, one at the beginning of another
            of = with_broken_token(with_broken_token(of, 1, 20, torch.nan), 3, 64, torch.inf)
        if features.softcap:  # a score of infinity, which the cap must not hide; of a row that decodes, and a chunk
            of = with_broken_key(of, 6, of.layout.chunks[2].first + 5)
        output, cache = find_kernel_errors(of, device, splits)
        what = f"{'8-bit cache, ' if is_rounded else ''}{dtype} {heads} {features} splits={splits}"
        yield f"{what}: {output:.1e}, cache {cache:.1e}", output < TOLERANCES[dtype] and cache == 0


def linear_layers(device: str) -> Iterator[tuple[str, bool]]:
    """As `attentions`, of the products of few tokens and a linear layer's weights."""
    from batchgen.engines.paged import skinny_gemm

    source = torch.Generator().manual_seed(0)
    dtypes = [torch.float16, torch.bfloat16] if device == "cuda" else [torch.float16]
    sizes = [(1, 512, 40), (2, 1024, 64), (16, 1536, 33), (7, 4096, 4096)] if device == "cuda" else [(3, 1024, 40)]
    for dtype in dtypes:
        for tokens, depth, columns in sizes:
            for biased in (False, True):
                # Wider than they are used: the tokens of a step are often part of a larger tensor.
                inputs = torch.randn(tokens, 2 * depth, generator=source).to(dtype)[:, :depth]
                weight = torch.randn(columns, depth, generator=source).to(dtype)
                bias = torch.randn(columns, generator=source).to(dtype) if biased else None
                assert skinny_gemm.covers(inputs, weight)
                expected = F.linear(inputs.double(), weight.double(), None if bias is None else bias.double())
                moved = inputs.to(device), weight.to(device), None if bias is None else bias.to(device)
                with poisoned():
                    out = skinny_gemm.multiply(*moved).cpu().double()
                error = ((out - expected).norm() / expected.norm()).item()
                yield f"{dtype} {tokens}x{depth}x{columns} bias={biased}: {error:.1e}", error < TOLERANCES[dtype]


if __name__ == "__main__":
    say_cases(linear_layers, attentions, rounded_attentions)
