"""The settings of one of the `config_groups` of compressed-tensors, as far as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from batchgen.models.quantised.format import refuse, take_block
from batchgen.models.quantised.weight import Inputs

NAME = "compressed-tensors"

_FORMATS: Mapping[tuple[str, str, Any], str] = {
    ("float-quantized", "float", 8): "fp8",
    ("naive-quantized", "float", 8): "fp8",
    ("int-quantized", "int", 8): "int8",
    ("naive-quantized", "int", 8): "int8",
    ("pack-quantized", "int", 4): "int4",
}
_STRATEGIES = {
    "fp8": ("tensor", "channel", "block"),
    "int8": ("tensor", "channel"),
    "int4": ("tensor", "channel", "group"),
}
_SORTED = (None, False, "weight", "static")  # the order of columns that groups were made in, and that they have kept


@dataclass(frozen=True)
class Scheme:
    """How the weights of a group are stored, and what their inputs become.

    Args:
        by_rows: each row has a scale.
        group: columns that have a scale together; 0: all.
        block: rows and columns that have a scale together.
        is_static: the scales of inputs are fixed.
    """

    kind: Literal["fp8", "int8", "int4"]
    by_rows: bool
    group: int
    block: tuple[int, int] | None
    is_symmetric: bool
    inputs: Inputs
    is_static: bool

    @classmethod
    def of(cls, settings: Mapping[str, Any], common_format: str | None) -> Scheme:
        """Returns the scheme of one group.

        Args:
            common_format: of groups that name none.

        Raises:
            ModelError: it has a detail that is not read.
        """
        weights = settings.get("weights") or {}
        written = settings.get("format") or common_format
        bits, number = weights.get("num_bits"), weights.get("type", "int")
        found = _FORMATS.get((str(written), number, bits))
        if found is None:
            refuse(NAME, f"format {written!r}, {number} of {bits} bits")
        if settings.get("output_activations"):
            refuse(NAME, "rounded outputs (output_activations)")
        is_symmetric = weights.get("symmetric", True)
        size: Any = weights.get("group_size")
        strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(size, "group")
        if strategy not in _STRATEGIES[found]:
            refuse(NAME, f"format {written!r} and strategy {strategy!r}")
        if not is_symmetric and found != "int4":
            refuse(NAME, f"format {written!r} and zeros (symmetric false)")
        if weights.get("actorder") not in _SORTED:
            refuse(NAME, f"columns in an order of their own (actorder {weights['actorder']!r})")
        if strategy == "group" and not (type(size) is int and size > 0 and size % 2 == 0):
            refuse(NAME, f"group_size {size!r}")
        block = take_block(NAME, weights, "block_structure") if strategy == "block" else None
        if strategy == "block" and block is None:
            refuse(NAME, "blocks of no size (block_structure)")
        inputs, is_static = _read_inputs(settings.get("input_activations"), found, block)
        return cls(
            kind=found,  # type: ignore[arg-type]  # a value of `_FORMATS`
            by_rows=strategy == "channel",
            group=size if strategy == "group" else 0,
            block=block,
            is_symmetric=is_symmetric,
            inputs=inputs,
            is_static=is_static,
        )


def _read_inputs(settings: Mapping[str, Any] | None, kind: str, block: tuple[int, int] | None) -> tuple[Inputs, bool]:
    """Returns what inputs are rounded to, and whether their scales are fixed."""
    if not settings:
        return "", False
    number, bits = settings.get("type", "int"), settings.get("num_bits")
    wanted: Inputs = {"fp8": "fp8", "int8": "int8"}.get(kind, "")  # type: ignore[assignment]
    if not wanted or (number, bits) != ("float" if kind == "fp8" else "int", 8):
        refuse(NAME, f"weights of {kind} and inputs of type {number}, {bits} bits")
    if not settings.get("symmetric", True):
        refuse(NAME, "zeros of inputs (input_activations with symmetric false)")
    dynamic, strategy = settings.get("dynamic", False), settings.get("strategy", "tensor")
    if dynamic not in (True, False):
        refuse(NAME, f"input_activations with dynamic {dynamic!r}")
    if strategy not in (("token", "tensor", "group") if dynamic else ("tensor",)):
        refuse(NAME, f"input_activations of strategy {strategy!r}")
    size = settings.get("group_size")
    if strategy == "group" and (block is None or size not in (None, block[1])):
        refuse(NAME, f"input_activations of strategy 'group', {size} columns each, beside weights with other groups")
    return wanted, not dynamic
