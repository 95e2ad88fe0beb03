"""The product of few tokens and the weights of a linear layer on a GPU, in Triton.

With so few tokens its time is that of reading the weights, once. The kernels of cuBLAS split the depth and add up the
partial sums, or ask for fewer bytes at once than the memory can give.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOKENS = 16
"""Most tokens of a product. Matrix units take as many rows; with 32 it is no faster than cuBLAS."""

_COLUMNS, _DEPTH = 16, 512  # of the weights that a program reads at once
_SETTINGS = {"num_warps": 2, "num_stages": 3}  # the best of 90 that were tried; benchmarks/README.md


def covers(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `multiply` takes these: few tokens, in 16 bits, and a weight [columns, depth] of a fitting depth."""
    tokens, depth = inputs.shape
    in_order = weight.is_contiguous() and inputs.stride(1) == 1
    return tokens <= TOKENS and inputs.dtype.itemsize == 2 and depth % _DEPTH == 0 and in_order


def multiply(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `torch.nn.functional.linear`, with sums in float32.

    Args:
        inputs: [tokens, depth], at most `TOKENS` tokens; the numbers of a token are adjacent in memory.
        weight: [columns, depth], contiguous.
        bias: [columns], or None.
    """
    (tokens, depth), columns = inputs.shape, len(weight)
    out = torch.empty((tokens, columns), dtype=inputs.dtype, device=inputs.device)
    grid = (triton.cdiv(columns, _COLUMNS),)
    sizes = (tokens, columns, depth, inputs.stride(0))
    shape = {"TOKENS": TOKENS, "COLUMNS": _COLUMNS, "DEPTH": _DEPTH, "BIAS": bias is not None}
    _multiply[grid](inputs, weight, bias, out, *sizes, **shape, **_SETTINGS)
    return out


@triton.jit
def _multiply(
    inputs, weight, bias, out, tokens, columns, depth, input_token,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """`COLUMNS` columns for all tokens. The weights are the larger side, so that all rows of a matrix unit work."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.arange(0, TOKENS)
    each = tl.arange(0, DEPTH)
    inside = column < columns
    there = token < tokens
    weights_at = weight + column.to(tl.int64)[:, None] * depth + each[None, :]
    inputs_at = inputs + token[None, :] * input_token + each[:, None]
    sums = tl.zeros([COLUMNS, TOKENS], tl.float32)
    for begin in range(0, depth, DEPTH):
        weights = tl.load(weights_at + begin, mask=inside[:, None], other=0.0, eviction_policy="evict_first")
        block = tl.load(inputs_at + begin, mask=there[None, :], other=0.0)
        sums = tl.dot(weights, block, sums)
    if BIAS:
        sums += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[:, None]
    to = out + token[None, :] * columns + column[:, None]
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside[:, None] & there[None, :])
