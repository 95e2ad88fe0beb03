"""A matrix product with weights of 8 bits on a GPU: they are widened in registers, so only 8 bits come from memory.

What torch, torchao and bitsandbytes do takes two to six times as long as a product in 16 bits, since they write the
weights out in 16 bits first, or round the activations too (benchmarks/README.md, "Weights of 8 bits").
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _product(
    inputs: Any,
    values: Any,
    scales: Any,
    outputs: Any,
    rows: Any,
    count: Any,
    width: Any,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """outputs [rows, count] = inputs [rows, width] @ (values [count, width] * scales [count, 1]).T"""
    of_inputs = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    of_values = tl.program_id(0) * BLOCK_COUNT + tl.arange(0, BLOCK_COUNT)
    # 64 bits: the values of a whole vocabulary are more than 2^31.
    left = inputs + of_inputs[:, None].to(tl.int64) * width
    right = values + of_values[None, :].to(tl.int64) * width
    there, here = of_inputs[:, None] < rows, of_values[None, :] < count
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COUNT), dtype=tl.float32)
    for begin in range(0, width, BLOCK_WIDTH):
        places = begin + tl.arange(0, BLOCK_WIDTH)
        part = tl.load(left + places[None, :], mask=there & (places[None, :] < width), other=0.0)
        weights = tl.load(right + places[:, None], mask=here & (places[:, None] < width), other=0)
        sums += tl.dot(part, weights.to(part.dtype))
    sums *= tl.load(scales + of_values, mask=of_values < count, other=0.0)[None, :].to(tl.float32)
    places_out = outputs + of_inputs[:, None].to(tl.int64) * count + of_values[None, :]
    tl.store(places_out, sums.to(outputs.dtype.element_ty), mask=there & here)


def blocks(rows: int) -> dict[str, int]:
    """Sizes of the pieces that one program works on, for so many rows of inputs."""
    block = max(16, min(128, triton.next_power_of_2(rows)))
    if block <= 32:
        return {"BLOCK_ROWS": block, "BLOCK_COUNT": 32, "BLOCK_WIDTH": 256, "num_warps": 4, "num_stages": 4}
    if block == 64:
        return {"BLOCK_ROWS": block, "BLOCK_COUNT": 64, "BLOCK_WIDTH": 128, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_ROWS": block, "BLOCK_COUNT": 128, "BLOCK_WIDTH": 64, "num_warps": 8, "num_stages": 4}


def product(
    inputs: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, sizes: dict[str, int] | None = None
) -> torch.Tensor:
    """`inputs` [..., width] in 16 bits times the rows of `values` [count, width], int8, by `scales` [count, 1]."""
    flat = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    outputs = flat.new_empty(len(flat), len(values))
    sizes = sizes or blocks(len(flat))
    grid = (triton.cdiv(len(values), sizes["BLOCK_COUNT"]), triton.cdiv(len(flat), sizes["BLOCK_ROWS"]))
    with torch.cuda.device(flat.device):  # Triton starts on the current one
        _product[grid](flat, values, scales, outputs, *flat.shape[:1], len(values), flat.shape[1], **sizes)
    return outputs.view(*inputs.shape[:-1], len(values))
