"""The kernels of `paged` beside float64: `python -m tests.engines.paged.kernel_cases [cuda]`.

On a GPU, or, where Triton is told to interpret them, on the CPU. Outputs are poisoned before they are written.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from tests.engines.paged.attention_cases import case, errors, poisoned, with_broken_token, with_stale_cache

# Window, ALiBi, splits. With a window of 200 some keys of a long sequence are seen by all queries of a block.
_KINDS = ((0, False, 1), (0, False, 4), (0, True, 4), (37, False, 1), (37, True, 4), (200, True, 1))
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def attentions(device: str) -> Iterator[tuple[str, bool]]:
    """Each case in words, and whether it is right."""
    # The interpreter has no bfloat16, and takes seconds for a case; so does the compiler for one in float32.
    shapes = {torch.float32: [(6, 2, 16), (2, 1, 24)]}
    if device == "cuda":
        shapes = {
            torch.bfloat16: [(4, 4, 64), (9, 3, 80), (32, 8, 128), (17, 1, 256)],
            torch.float16: [(32, 8, 128)],
            torch.float32: [(9, 3, 80), (4, 2, 8)],
        }
    for number, dtype in enumerate(shapes):
        for heads, key_heads, size in shapes[dtype]:
            for window, alibi, splits in _KINDS:
                of = with_stale_cache(case((heads, key_heads, size), dtype, window=window, alibi=alibi, seed=number))
                if splits == 1:  # a token in the middle of a block, one at the beginning of another
                    of = with_broken_token(with_broken_token(of, 1, 20, torch.nan), 3, 64, torch.inf)
                output, cache = errors(of, device, splits)
                what = f"{dtype} {heads}/{key_heads}x{size} window={window} alibi={alibi} splits={splits}"
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


def main(device: str) -> None:
    """Writes a line a case; the last one says whether all are right."""
    wrong = 0
    for cases in (linear_layers, attentions):
        for line, right in cases(device):
            wrong += not right
            sys.stdout.write(f"{line} {'' if right else 'WRONG'}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{wrong} wrong\n")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["cpu"])
