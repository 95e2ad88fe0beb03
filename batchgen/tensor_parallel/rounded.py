"""Which weights are rounded as they are copied to where a rank computes, and how much is read of one at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from batchgen.engine import EngineError
from batchgen.models.int8 import Int8Weight
from batchgen.models.quantised.places import get_quantised
from batchgen.models.quantised.rounding import Scheme, round_weight
from batchgen.models.quantised.selection import RoundedPlace, choose_weights
from batchgen.models.quantised.weight import QuantisedWeight
from batchgen.tensor_parallel.file_views import Pieces, find_pieces

Rounding = Scheme | type[Int8Weight]
"""`Int8Weight`: linear layers and embeddings, for engines that compute with `torch.nn.functional` alone."""

_LEAST_SHARE = 0.5  # of the numbers in a decoder's layers: with fewer, what was asked for would hardly be had
_BYTES_AT_ONCE = 1 << 30  # of experts in the type of their files


@dataclass(frozen=True)
class RoundingPlan:
    """What becomes of the parameters of a model."""

    scheme: Scheme
    chosen: Mapping[int, RoundedPlace]  # those that are rounded, by their `id`

    def round(self, key: int, parts: Iterator[torch.Tensor]) -> QuantisedWeight:
        """Returns a parameter, rounded.

        Args:
            key: its `id`.
            parts: of its first dimension, as they come; each is let go before the next.
        """
        is_transposed = self.chosen[key].is_transposed
        made = []
        for part in parts:
            matrix = part.transpose(-1, -2) if is_transposed else part
            made.append(round_weight(matrix, self.scheme, part.dtype))
        if len(made) == 1:
            return made[0]
        first = made[0]
        zeros = [one.zeros for one in made if one.zeros is not None]
        return replace(
            first,
            values=torch.cat([one.values for one in made]),
            scales=torch.cat([one.scales for one in made]),
            zeros=torch.cat(zeros) if zeros else None,
        )


def plan_rounding(
    model: Any, scheme: Scheme, homes: Mapping[int, Collection[tuple[nn.Module, str, str]]], kept: Callable[[str], bool]
) -> RoundingPlan:
    """Returns what is rounded of a model, or of a rank's share of one.

    Args:
        homes: where each parameter is (module, name in it, path), by its `id`.
        kept: whether the parameter of a path keeps its type.

    Raises:
        EngineError: most would not be, or the groups of the scheme do not divide a matrix.
    """
    by_path = choose_weights(model)
    chosen = {}
    for key, places in homes.items():
        paths = [path for *_, path in places]
        if all(path in by_path and not kept(path) for path in paths):
            chosen[key] = by_path[paths[0]]
    chosen = {key: place for key, place in chosen.items() if place.numel}  # a rank may have no row of a small matrix
    share = sum(place.numel for place in chosen.values()) / max(1, _count_numbers(model, homes))
    if share < _LEAST_SHARE:
        raise EngineError(
            f"--dtype {scheme.kind} would round {share:.0%} of the numbers in the layers of a "
            f"{model.config.model_type} model: "
            "the others are in modules that are not known here as linear layers or experts. Use --dtype bfloat16"
        )
    try:
        fitting = scheme.fit(place.columns for place in chosen.values())
    except ValueError as error:
        other = "another group size (--set group_size=N; of quantise, --group-size N), " if scheme.group_size else ""
        raise EngineError(
            f"--dtype int4: {error}. Use {other}--dtype int8 or, with --tp, another number of ranks"
        ) from error
    return RoundingPlan(fitting, chosen)


def _count_numbers(model: Any, homes: Mapping[int, Collection[tuple[nn.Module, str, str]]]) -> int:
    """Returns the numbers of the parameters in the layers of the decoder, each once."""
    inside = {id(parameter): parameter.numel() for parameter in model.get_decoder().parameters()}
    in_layers = [
        key for key, places in homes.items() if any(part.isdigit() for *_, path in places for part in path.split("."))
    ]
    return sum(inside.get(key, 0) for key in in_layers)


def cut_experts(source: nn.Parameter) -> Iterator[torch.Tensor | Pieces]:
    """Yields a parameter in parts of its first dimension, if it is that of experts; else as it is."""
    pieces = find_pieces(source)
    count = len(source)
    if source.dim() < 3:
        yield source.data if pieces is None else pieces
        return
    at_once = max(1, _BYTES_AT_ONCE * count // max(1, source.numel() * source.element_size()))
    for first in range(0, count, at_once):
        span = slice(first, first + at_once)
        yield source.data[span] if pieces is None else Pieces(pieces.experts[span], pieces.axis)


def count_bytes(model: nn.Module) -> int:
    """Returns the bytes of the parameters and buffers of a model, and of the rounded weights beside placeholders."""
    sizes: dict[int, int] = {}
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            held = get_quantised(module, name) or tensor
            if held is not None:
                sizes[id(held)] = held.nbytes
    return sum(sizes.values())
