"""Products of sorted pairs, each with the weights of its own expert.

Which way a product is computed depends on the number of pairs, which the compiler leaves open; so it is an operator
that decides when it runs, by shapes alone.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

MANY_PAIRS = 512
"""Pairs an expert, on average, from which a product in bfloat16 on a GPU is torch's own: on an H200 both take as long
then, and with fewer our kernel is faster (benchmarks/README.md)."""


class Sorting(NamedTuple):
    """Which expert each pair belongs to; see `routing.sort_by_expert`."""

    order: torch.Tensor  # [pairs], int32
    offsets: torch.Tensor  # [experts + 1], int32
    top_k: int
    """Experts a token, for inputs of one row a token; 0 for inputs of one row a pair, sorted."""


def multiply(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sorting: Sorting) -> torch.Tensor:
    """Multiplies each pair's row of the inputs by its expert's weight. Sums are float32 or better.

    Args:
        inputs: [tokens, depth] or [pairs, depth], as `sorting.top_k` says.
        weight: [experts, columns, depth], of the inputs' type, with any strides: a transposed view is not copied.
        bias: [experts, columns], or None.

    Returns:
        [pairs, columns], sorted. Rows of pairs without an expert are not written.
    """
    output: torch.Tensor = torch.ops.batchgen.grouped_product(inputs, weight, bias, *sorting)
    return output


def _multiply(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    order: torch.Tensor,
    offsets: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """The operator's implementation."""
    sorting = Sorting(order, offsets, top_k)
    if inputs.device.type != "cuda":
        return multiply_in_loop(inputs, weight, bias, sorting)
    if len(order) >= MANY_PAIRS * len(weight) and _fits_torch(weight):
        return multiply_in_torch(inputs, weight, bias, sorting)
    from batchgen.engines.paged.experts import grouped_gemm_kernel  # Triton comes with a torch for GPUs alone

    return grouped_gemm_kernel.multiply(inputs, weight, bias, sorting)


def multiply_in_loop(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sorting: Sorting
) -> torch.Tensor:
    """As `multiply`, one product for each expert that has pairs.

    On a CPU torch's `grouped_mm` takes as long (0.9 to 1.1 of it in 18 of 24 shapes on two cores, torch 2.13), and
    older versions do not have it.
    """
    rows = take_rows(inputs, sorting)
    output = rows.new_empty((len(rows), weight.shape[1]))
    ends = sorting.offsets.tolist()
    for expert, (begin, end) in enumerate(pairwise(ends)):
        if begin < end:
            expert_bias = None if bias is None else bias[expert]
            output[begin:end] = torch.nn.functional.linear(rows[begin:end], weight[expert], expert_bias)
    return output


def multiply_in_torch(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sorting: Sorting
) -> torch.Tensor:
    """As `multiply_in_loop`, by torch's own product of groups, which does not wait for a GPU in bfloat16."""
    product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    output: torch.Tensor = product(take_rows(inputs, sorting), weight.transpose(1, 2), offs=sorting.offsets[1:])
    return output if bias is None else add_bias(output, bias, sorting)


def add_bias(output: torch.Tensor, bias: torch.Tensor, sorting: Sorting) -> torch.Tensor:
    """Adds to each sorted pair's row of the output, in place, the bias of its expert, [experts, columns]."""
    places = torch.arange(len(output), device=output.device, dtype=sorting.offsets.dtype)
    expert = torch.searchsorted(sorting.offsets[1:], places, right=True).clamp(max=len(bias) - 1)
    return output.add_(bias[expert])


def _fits_torch(weight: torch.Tensor) -> bool:
    """Whether `multiply_in_torch` takes this weight on a GPU without waiting for it, with rows of 16 bytes each."""
    _, columns, depth = weight.shape
    return weight.dtype == torch.bfloat16 and columns % 8 == 0 and depth % 8 == 0


def take_rows(inputs: torch.Tensor, sorting: Sorting) -> torch.Tensor:
    """The row of each pair, sorted, [pairs, depth]."""
    return inputs[sorting.order // sorting.top_k] if sorting.top_k else inputs


def _make_output(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    _bias: torch.Tensor | None,
    order: torch.Tensor,
    _offsets: torch.Tensor,
    _top_k: int,
) -> torch.Tensor:
    return inputs.new_empty((order.shape[0], weight.shape[1]))


_library = torch.library.Library("batchgen", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "grouped_product(Tensor inputs, Tensor weight, Tensor? bias, Tensor order, Tensor offsets, int top_k) -> Tensor"
)
_library.impl("grouped_product", _multiply, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("batchgen::grouped_product", _make_output, lib=_library)
