"""Adds up the outputs of each token's experts."""

from __future__ import annotations

import torch


def combine(
    outputs: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, top_k_index: torch.Tensor, experts: int
) -> torch.Tensor:
    """Sums the outputs of each token's pairs, with their weights, in float32 (float64 for a model of that).

    Args:
        outputs: of the pairs, sorted by expert, [pairs, width].
        places: where each token's pairs are in `outputs`, int32 [tokens, K].
        weights: of the pairs, [tokens, K], any floating type.
        top_k_index: the expert of each pair, [tokens, K]; a number from `experts` on is no expert's: `outputs` is not
            written for it, and it adds nothing.

    Returns:
        [tokens, width], in the type of `outputs`.
    """
    output: torch.Tensor = torch.ops.batchgen.combine_experts(outputs, places, weights, top_k_index, experts)
    return output


def _combine(
    outputs: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, top_k_index: torch.Tensor, experts: int
) -> torch.Tensor:
    """The operator's implementation."""
    if outputs.device.type != "cuda":
        return combine_in_torch(outputs, places, weights, top_k_index, experts)
    from batchgen.engines.paged.experts import combining_kernel  # Triton comes with a torch for GPUs alone

    return combining_kernel.combine(outputs, places, weights, top_k_index, experts)


def combine_in_torch(
    outputs: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, top_k_index: torch.Tensor, experts: int
) -> torch.Tensor:
    """As `combine`, in plain torch on any device."""
    wide = torch.promote_types(outputs.dtype, torch.float32)
    chosen = outputs[places].to(wide) * weights.to(wide).unsqueeze(-1)
    return chosen.masked_fill((top_k_index >= experts).unsqueeze(-1), 0).sum(1).to(outputs.dtype)


def _make_output(
    outputs: torch.Tensor, places: torch.Tensor, _weights: torch.Tensor, _top_k_index: torch.Tensor, _experts: int
) -> torch.Tensor:
    return outputs.new_empty((places.shape[0], outputs.shape[1]))


_library = torch.library.Library("batchgen", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "combine_experts(Tensor outputs, Tensor places, Tensor weights, Tensor top_k_index, int experts) -> Tensor"
)
_library.impl("combine_experts", _combine, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("batchgen::combine_experts", _make_output, lib=_library)
