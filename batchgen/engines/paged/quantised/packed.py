"""A quantised weight as the operators take it."""

from __future__ import annotations

from typing import NamedTuple

import torch

PLAIN = "plain "
"""Begins the form of a weight whose tensors are those of its QuantisedWeight: on a CPU."""

HUMMING = "humming "
"""Begins the form of a weight that is packed for package humming-kernels; behind it stands the layer's config, as
JSON."""


class Packed(NamedTuple):
    """The tensors that the operators take. `…` is nothing, or the experts."""

    form: str  # the kind of the weight, for our own kernels; behind PLAIN, if it is not packed; or behind HUMMING
    # The tensors of our own kernels; those of humming-kernels are in its own order.
    values: torch.Tensor  # 8 bits: […, rows, columns]; 4 bits: […, blocks, rows, PART], int32
    scales: torch.Tensor  # […, groups, rows]: float32, float16 or bfloat16; of mxfp4, see `pack_exponents`
    zeros: torch.Tensor | None  # […, groups, rows], int32: what the compiler reads ahead has four bytes
    bias: torch.Tensor | None = None  # of the layer, in the order of humming-kernels; None: it is not there yet
