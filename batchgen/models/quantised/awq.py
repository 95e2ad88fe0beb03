"""Method `awq`, as AutoAWQ writes it (version "gemm"): 4 bits by groups of columns, with zeros.

A layer X has `X.qweight` int32 [in, out / 8], `X.qzeros` int32 [in / group, out / 8] and `X.scales` [in / group, out].
A word holds eight columns of `out`, the number in bits 4i to 4i+3 being that of column `_ORDER[i]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from batchgen.models.quantised.format import Format, check_choices, refuse, take_group_size
from batchgen.models.quantised.packing import make_groups_even, pack_pairs, unpack_words
from batchgen.models.quantised.stored import StoredTensor, StoredWeight, group_by_layer, take_words
from batchgen.models.quantised.weight import QuantisedWeight

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_KNOWN: Mapping[str, tuple[Any, ...]] = {
    "bits": (4,),
    "w_bit": (4,),
    "zero_point": (True,),
    "version": ("gemm", "GEMM"),
    "backend": ("autoawq",),
}


@dataclass(frozen=True)
class Awq(Format):
    """A checkpoint's own settings.

    Args:
        group_size: columns that have a scale together; -1: all.
    """

    group_size: int
    name = "awq"
    ends = ("qweight", "qzeros", "scales")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Awq:
        """Returns the format that a `quantization_config` describes.

        Raises:
            ModelError: it has a detail that is not read.
        """
        check_choices(cls.name, settings, _KNOWN)
        return cls(take_group_size(cls.name, settings))

    def find_weights(self, tensors: Mapping[str, StoredTensor]) -> list[StoredWeight]:
        layers = group_by_layer(tensors, self.ends)
        for layer in layers:
            if layer.endswith(".act"):  # of bloom, falcon, mpt, gpt_neox and a few more
                refuse(self.name, f"a scale for the outputs of an activation ({layer}.scales)")
        return [self._describe(layer, parts) for layer, parts in layers.items()]

    def _describe(self, layer: str, parts: Mapping[str, StoredTensor]) -> StoredWeight:
        weight, zeros, scales = take_words(layer, parts)
        columns, words = weight.take_matrix_shape()
        rows = 8 * words
        group = columns if self.group_size == -1 else self.group_size
        groups = -(-columns // group)
        zeros.check_shape((groups, rows // 8))
        scales.check_shape((groups, rows))
        return StoredWeight(f"{layer}.weight", (rows, columns), parts, lambda tensors: _convert(tensors, group))


def _convert(parts: Mapping[str, torch.Tensor], group: int) -> QuantisedWeight:
    values = pack_pairs(unpack_words(parts["qweight"], _ORDER).t())
    zeros = unpack_words(parts["qzeros"], _ORDER).t().contiguous()
    weight = QuantisedWeight("int4", values.contiguous(), parts["scales"].t().contiguous(), zeros)
    return make_groups_even(weight, group)
