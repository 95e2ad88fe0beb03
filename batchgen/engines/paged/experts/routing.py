"""Sorts the pairs of tokens and experts by expert."""

from __future__ import annotations

import torch


def sort_by_expert(top_k_index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sorts pairs by expert; those of one expert stay in the order of their tokens.

    Args:
        top_k_index: the experts of each token, [tokens, K]. Pairs of numbers from `experts` on come last.
        experts: how many there are.

    Returns:
        int32 each: the pair at each place, [pairs]; the place of each pair, [pairs]; the first place of each expert,
        and behind the last expert the end of its own, [experts + 1].
    """
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.batchgen.sort_by_expert(top_k_index, experts)
    return result


def _sort(top_k_index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator's implementation."""
    if top_k_index.device.type != "cuda":
        return sort_in_torch(top_k_index, experts)
    from batchgen.engines.paged.experts import routing_kernel  # Triton comes with a torch for GPUs alone

    return routing_kernel.sort_by_expert(top_k_index, experts)


def sort_in_torch(top_k_index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `sort_by_expert`, in plain torch on any device."""
    numbers = top_k_index.flatten().clamp(max=experts)
    order = torch.argsort(numbers, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    counts = torch.bincount(numbers, minlength=experts + 1)
    offsets = counts.cumsum(0) - counts
    return order.int(), inverse.int(), offsets.int()


def _make_outputs(top_k_index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pairs = top_k_index.shape[0] * top_k_index.shape[1]
    order, inverse = (top_k_index.new_empty((pairs,), dtype=torch.int32) for _ in range(2))
    return order, inverse, top_k_index.new_empty((experts + 1,), dtype=torch.int32)


_library = torch.library.Library("batchgen", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "sort_by_expert(Tensor top_k_index, int experts) -> (Tensor, Tensor, Tensor)"
)
_library.impl("sort_by_expert", _sort, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("batchgen::sort_by_expert", _make_outputs, lib=_library)
