"""Method `mxfp4`: the experts of gpt-oss, floats of 4 bits with a power of two for every 32 columns.

The experts' parameter P has `P_blocks` uint8 [experts, out, in / 32, 16], whose bytes hold two adjacent columns, the
even one in the low half, and `P_scales` uint8 [experts, out, in / 32]: exponents, with 127 added. All that is the
form of `QuantisedWeight`, so that nothing is converted. (OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from batchgen.models.quantised.format import Format
from batchgen.models.quantised.stored import StoredTensor, StoredWeight, group_by_layer, take_part
from batchgen.models.quantised.weight import QuantisedWeight


@dataclass(frozen=True)
class Mxfp4(Format):
    """It has no settings."""

    name = "mxfp4"
    ends = ("blocks", "scales")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Mxfp4:
        """Returns the format."""
        return cls()

    def find_weights(self, tensors: Mapping[str, StoredTensor]) -> list[StoredWeight]:
        layers = group_by_layer(tensors, self.ends, dot="_")
        return [self._describe(name, parts) for name, parts in layers.items()]

    def _describe(self, name: str, parts: Mapping[str, StoredTensor]) -> StoredWeight:
        blocks, scales = (take_part(name, parts, end, dot="_") for end in self.ends)
        blocks.check_dtype("U8")
        scales.check_dtype("U8", "F8_E8M0")
        *leading, groups = scales.shape or (1,)
        blocks.check_shape((*leading, groups, 16))
        return StoredWeight(name, (*leading, groups * 32), parts, _convert, is_transposed=True)


def _convert(parts: Mapping[str, torch.Tensor]) -> QuantisedWeight:
    return QuantisedWeight("mxfp4", parts["blocks"].flatten(-2), parts["scales"].view(torch.float8_e8m0fnu))
