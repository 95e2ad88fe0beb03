"""Method `gptq`: 4 bits by groups of columns; `desc_act` gives the groups to columns in an order of their own.

A layer X has `X.qweight` int32 [in / 8, out], whose words hold eight columns of `in`, the first lowest; `X.qzeros`
int32 [groups, out / 8], `X.scales` [groups, out], and `X.g_idx` int32 [in], the group of each column. In
checkpoints of format "gptq" the zeros are stored less one, in those of "gptq_v2" as they are. One is taken from the
eight zeros of a word at once: where one of them is 0, it borrows from the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from batchgen.models.definition.errors import ModelError
from batchgen.models.quantised.format import Format, check_choices, refuse, take_group_size
from batchgen.models.quantised.packing import make_groups_even, pack_pairs, unpack_words, view_words_as_pairs
from batchgen.models.quantised.stored import StoredTensor, StoredWeight, group_by_layer, take_part, take_words
from batchgen.models.quantised.weight import ZERO_OF_INT4, QuantisedWeight

_KNOWN: Mapping[str, tuple[Any, ...]] = {
    "bits": (4,),
    "checkpoint_format": ("gptq", "gptq_v2"),
    "format": ("gptq", "gptq_v2"),
    "pack_dtype": ("int32",),
    "is_marlin_format": (False,),
}

_ONES = 0x11111111  # in each of the eight numbers of a word


@dataclass(frozen=True)
class Gptq(Format):
    """A checkpoint's own settings.

    Args:
        group_size: columns that have a scale together; -1: all.
        zeros_plus: what is added to a stored zero.
        is_by_act: the columns of a group lie apart (`desc_act`), and `g_idx` alone says where.
    """

    group_size: int
    zeros_plus: int
    is_by_act: bool
    name = "gptq"
    ends = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Gptq:
        """Returns the format that a `quantization_config` describes.

        Raises:
            ModelError: it has a detail that is not read.
        """
        check_choices(cls.name, settings, _KNOWN)
        # GPTQModel's settings for some layers; those that begin with "-:" leave them alone, which their tensors show.
        others = [name for name in settings.get("dynamic") or {} if not name.startswith("-:")]
        if others:
            refuse(cls.name, f"settings of their own for some layers (dynamic: {others[0]!r})")
        written = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        group_size = take_group_size(cls.name, settings)
        is_by_act = bool(settings.get("desc_act")) and not settings.get("static_groups") and group_size != -1
        return cls(group_size, 0 if written == "gptq_v2" else 1, is_by_act)

    def find_weights(self, tensors: Mapping[str, StoredTensor]) -> list[StoredWeight]:
        layers = group_by_layer(tensors, self.ends)
        return [self._describe(layer, parts) for layer, parts in layers.items()]

    def _describe(self, layer: str, parts: Mapping[str, StoredTensor]) -> StoredWeight:
        weight, zeros, scales = take_words(layer, parts)
        words, rows = weight.take_matrix_shape()
        columns = 8 * words
        group = columns if self.group_size == -1 else self.group_size
        groups = -(-columns // group)
        zeros.check_shape((groups, -(-rows // 8)))
        scales.check_shape((groups, rows))
        if "g_idx" in parts or self.is_by_act:
            take_part(layer, parts, "g_idx").check_shape((columns,))
        convert = _Conversion(f"{weight.file.path}: {layer}", group, self.zeros_plus)
        return StoredWeight(f"{layer}.weight", (rows, columns), parts, convert)


@dataclass(frozen=True)
class _Conversion:
    layer: str  # for messages
    group: int
    zeros_plus: int

    def __call__(self, parts: Mapping[str, torch.Tensor]) -> QuantisedWeight:
        words, scales = parts["qweight"].t(), parts["scales"].t().contiguous()
        columns, rows = words.shape[1] * 8, words.shape[0]
        stored = parts["qzeros"] + self.zeros_plus * _ONES
        zeros: torch.Tensor | None = unpack_words(stored)[:, :rows].t().contiguous()
        assert zeros is not None
        if bool((zeros == ZERO_OF_INT4).all()):  # symmetric
            zeros = None
        weight = QuantisedWeight("int4", view_words_as_pairs(words, columns), scales, zeros)
        order = self._find_order(parts["g_idx"], columns) if "g_idx" in parts else None
        if order is not None:
            numbers = unpack_words(words.contiguous())[:, order]
            weight = replace(weight, values=pack_pairs(numbers).contiguous(), order=order.int())
        return make_groups_even(weight, self.group)

    def _find_order(self, group_of: torch.Tensor, columns: int) -> torch.Tensor | None:
        """Returns the columns in the order of their groups, int64 [columns]; None: they are in it."""
        groups = torch.arange(columns, device=group_of.device) // self.group
        if torch.equal(group_of.long(), groups):
            return None
        order = group_of.argsort(stable=True)
        if not torch.equal(group_of[order].long(), groups):
            raise ModelError(
                f"{self.layer}.g_idx does not give each group {self.group} columns, as quantization_config says of "
                "them; copy or download the model again"
            )
        return order
