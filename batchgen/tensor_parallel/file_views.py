"""Parameters that are put together of views of files, when they are copied to where the rank computes.

A rank's share of an expert's matrix is two pieces of it, rows of the gate and rows of what is gated, and a checkpoint
may hold the matrices of each expert apart. A tensor of them all would be a copy in host memory, of the whole model. So
the model gets a placeholder of the right shape, without memory, that knows its pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, log_conversion_errors


@dataclass(frozen=True, slots=True)
class Pieces:
    """A tensor [experts, …] as views of what lies in files."""

    experts: Sequence[Sequence[torch.Tensor]]  # of each expert, what is to be joined along `axis`
    axis: int  # of one expert's tensor

    @classmethod
    def of(cls, parameter: nn.Parameter, axis: int) -> Pieces:
        """Returns the pieces of a parameter [experts, …]: those it is made of, or each expert's whole part.

        Args:
            axis: along which the pieces of each expert will be cut.

        Raises:
            ValueError: it is made of pieces that are joined along another axis.
        """
        own = find_pieces(parameter)
        if own is None:
            return cls([[expert] for expert in parameter.data], axis)
        if own.axis != axis and any(len(pieces) > 1 for pieces in own.experts):
            raise ValueError(f"its experts are joined along axis {own.axis}, and are to be cut along {axis}")
        return cls(own.experts, axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        first = self.experts[0]
        shape = list(first[0].shape)
        shape[self.axis] = sum(piece.shape[self.axis] for piece in first)
        return (len(self.experts), *shape)

    def cut(self, spans: Sequence[tuple[int, int]]) -> Pieces:
        """Returns what is left if, of each expert, nothing but these spans of the axis is kept.

        Args:
            spans: first number and length of each, in the order in which they are joined.
        """
        return Pieces(
            [[view for span in spans for view in _cut(pieces, self.axis, span)] for pieces in self.experts], self.axis
        )

    def assemble(self, device: torch.device) -> torch.Tensor:
        """Reads the pieces, one after the other, into one tensor on `device`."""
        whole = torch.empty(self.shape, dtype=self.experts[0][0].dtype, device=device)
        for place, pieces in zip(whole, self.experts, strict=True):
            first = 0
            for piece in pieces:
                length = piece.shape[self.axis]
                place.narrow(self.axis, first, length).copy_(piece)
                first += length
        return whole

    def make_placeholder(self) -> nn.Parameter:
        """Returns a parameter of this shape, zeros without memory, that stands for the pieces until they are read."""
        zero = torch.zeros((), dtype=self.experts[0][0].dtype)
        parameter = nn.Parameter(zero.expand(self.shape), requires_grad=False)
        parameter.batchgen_pieces = self  # type: ignore[attr-defined]
        return parameter


def _cut(pieces: Sequence[torch.Tensor], axis: int, span: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Yields views of a span of pieces that are joined along `axis`."""
    begin, end = span[0], span[0] + span[1]
    first = 0
    for piece in pieces:
        length = piece.shape[axis]
        low, high = max(begin - first, 0), min(end - first, length)
        if low < high:
            yield piece.narrow(axis, low, high - low)
        first += length


def find_pieces(parameter: torch.Tensor) -> Pieces | None:
    """Returns what a placeholder stands for; None: the parameter holds its own numbers."""
    pieces: Pieces | None = getattr(parameter, "batchgen_pieces", None)
    return pieces


def forget_pieces(parameter: torch.Tensor) -> None:
    """Lets go of what a placeholder stands for, once it is read."""
    if find_pieces(parameter) is not None:
        parameter.batchgen_pieces = None  # type: ignore[attr-defined]


# Warning: `keep_views` replaces a method of Transformers' loader while a model is loaded.
#
# Why: checkpoints of most mixtures hold a tensor for each expert, which the loader stacks: every rank would read the
# whole model into memory of its own (93 GB of Mixtral-8x7B), to keep a share.
#
# What breaks: the loader's operations are known by their types, `MergeModulelist(0)` with or without `Concatenate(1)`
# behind it. A version that stacks by others copies again, and the text is right; one that gives these two another
# meaning would load experts in another order: tests/tensor_parallel/test_experts.py compares them with a plain load.


@contextmanager
def keep_views() -> Iterator[None]:
    """Within, Transformers loads experts that lie apart in files as placeholders: nothing of them is read."""
    convert = WeightConverter.convert

    def keep(converter: Any, layer_name: str, *arguments: Any, **named: Any) -> Any:
        if not _only_stacks(converter):
            return convert(converter, layer_name, *arguments, **named)
        return _stack_views(converter, layer_name, **named)

    WeightConverter.convert = keep  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        WeightConverter.convert = convert  # type: ignore[method-assign]


def _only_stacks(converter: Any) -> bool:
    """Returns whether a converter does nothing but stack the experts' matrices, joined below each other.

    Around that, it may have the two steps of `batchgen.models.lora`, which change some of them.
    """
    _, steps, _ = _find_steps(converter.operations)
    stacks = [(type(step), step.dim) for step in steps if isinstance(step, (MergeModulelist, Concatenate))]
    known = stacks in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
    one = len(converter.target_patterns) == 1 and converter.quantization_operation is None
    return known and one and len(stacks) == len(steps)


def _find_steps(operations: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Returns the operations on the parts, those that stack, and those on the whole."""
    first = sum(getattr(operation, "keeps_parts_apart", False) for operation in operations[:1])
    last = len(operations) - sum(getattr(operation, "returns_what_it_leaves", False) for operation in operations[-1:])
    return operations[:first], operations[first:last], operations[last:]


def _stack_views(
    converter: Any, layer_name: str, model: Any = None, config: Any = None, loading_info: Any = None, **unused: Any
) -> dict[str, torch.Tensor]:
    """As `WeightConverter.convert`, of a converter that only stacks."""
    before, _, after = _find_steps(converter.operations)
    sources, targets = converter.source_patterns, converter.target_patterns
    names = {"full_layer_name": layer_name, "model": model, "config": config}
    parts: Any = converter.materialize_tensors()
    for step in before:
        with log_conversion_errors(layer_name, loading_info, None, step):
            parts = step.convert(parts, sources, targets, **names)
    matrices: list[Sequence[torch.Tensor]] = [parts[source] for source in sources if source in parts]
    pieces = Pieces(list(zip(*matrices, strict=True)), 0)
    placeholder = made = pieces.make_placeholder()
    for step in after:
        with log_conversion_errors(layer_name, loading_info, None, step):
            made = step.convert({targets[0]: placeholder}, sources, targets, **names)[targets[0]]
            if made is not placeholder:  # it is changed as a whole, which takes its numbers
                whole = pieces.assemble(torch.device("cpu"))
                made = step.convert({targets[0]: whole}, sources, targets, **names)[targets[0]]
    return {layer_name.replace("*.", "0."): made}
