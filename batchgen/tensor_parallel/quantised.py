"""Quantised weights of a rank's share: what the placeholders of a mapped model stand for, read where it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from batchgen.engine import EngineError
from batchgen.models import loading
from batchgen.models.quantised.checkpoint import Checkpoint
from batchgen.models.quantised.placeholders import Part, Placeholders
from batchgen.models.quantised.weight import ZERO_OF_INT4, QuantisedWeight, join_rows, stack_experts
from batchgen.tensor_parallel.file_views import find_pieces, keep_views

Forget = Callable[[torch.Tensor], None]
"""Lets go of the pages of a view of a file that have been read."""

_PLACE = "batchgen_placeholders"
_PATHS = "batchgen_placeholder_paths"


def map_quantised(folder: str, checkpoint: Checkpoint, attn_implementation: str | None) -> Any:
    """As `map_model`, of a quantised checkpoint: quantised weights are placeholders, plain ones mapped files.

    Raises:
        EngineError: as `loading.load`; or Transformers changes some of the quantised weights as it loads them.
    """
    dtype = checkpoint.dtype or torch.bfloat16
    placeholders = Placeholders(checkpoint.weights.values(), dtype)
    arguments = {"dtype": dtype, "attn_implementation": attn_implementation}
    with keep_views():
        state_dict = checkpoint.make_state_dict(placeholders.take)
        model = loading.load(folder, arguments, filled=False, state_dict=state_dict)
    placeholders.check_used(view for parameter in model.parameters() for view in _list_views(parameter))
    model.__dict__[_PLACE] = placeholders  # no module
    named = model.named_parameters(remove_duplicate=False)
    model.__dict__[_PATHS] = {path for path, parameter in named if stands_for_quantised(placeholders, parameter)}
    return model


def find_placeholders(model: nn.Module, folder: str, *, is_rounded: bool) -> Placeholders | None:
    """Returns what the placeholders of `model` stand for; None: it has none.

    Args:
        folder: of the model, for messages.
        is_rounded: what is read is to be rounded.

    Raises:
        EngineError: they stand for quantised weights, which are not rounded once more.
    """
    found: Placeholders | None = model.__dict__.get(_PLACE)
    if found is not None and found.weights and is_rounded:
        raise EngineError(f"the weights in {folder} are quantised as they are; leave out --dtype int8")
    return found


def check_share(model: nn.Module, placeholders: Placeholders) -> None:
    """Checks that a rank's share of `model` consists of views of its placeholders: a copy of one is zeros.

    Raises:
        EngineError: it does not.
    """
    for path, parameter in model.named_parameters(remove_duplicate=False):
        was_placeholder = path in model.__dict__[_PATHS] and parameter.numel() > 0
        if was_placeholder and not stands_for_quantised(placeholders, parameter):
            raise EngineError(
                f"--tp with these weights: DeepSpeed's AutoTP puts the rows of {path} into another order, which is not "
                "done to a quantised weight. Leave --tp out, or take the model in another precision"
            )


def takes_quantised(model: Any, module: nn.Module, name: str) -> bool:
    """Returns whether `module` is a linear layer, but not the head, or one of experts; all else is widened."""
    if name != "weight":
        return True
    # By their names: DeepSpeed takes seconds to import, and a rank that is alone does without it.
    names = {base.__name__ for base in type(module).__mro__}
    is_layer = isinstance(module, nn.Linear) or ("TensorParallel_Layer" in names and "VocabParallel" not in str(names))
    return is_layer and module is not model.get_output_embeddings()


def stands_for_quantised(placeholders: Placeholders, parameter: nn.Parameter) -> bool:
    """Returns whether `parameter`, or a piece of it, is a view of a placeholder."""
    return any(placeholders.find(view) is not None for view in _list_views(parameter))


def read_quantised(
    placeholders: Placeholders, parameter: nn.Parameter, device: torch.device, forget: Forget
) -> QuantisedWeight:
    """Reads what `parameter`, which stands for a quantised weight, stands for to `device`.

    Raises:
        EngineError: it is cut, or put together, in a way that its format does not allow.
    """
    pieces = find_pieces(parameter)
    if pieces is None:
        part = placeholders.find(parameter.data)
        assert part is not None
        return _read([part], device, forget)
    experts = [[placeholders.find(view) for view in views] for views in pieces.experts]
    known = [[part for part in parts if part is not None] for parts in experts]
    name = next(part for parts in known for part in parts).stored.name
    if any(len(parts) != len(views) for parts, views in zip(known, pieces.experts, strict=True)):
        raise EngineError(
            f"some experts beside {name} are quantised and some are not, which is not read; use --engine accelerate"
        )
    for parts in known:
        below = parts[0].is_transposed == (pieces.axis == 1)
        if len(parts) > 1 and not below:
            raise EngineError(f"{parts[0].stored.name} is to be joined by columns, which is not done to it")
    return _join([_read(parts, device, forget) for parts in known], stack_experts, name)


def _read(parts: Sequence[Part], device: torch.device, forget: Forget) -> QuantisedWeight:
    """Reads a matrix in parts that lie below each other, or a stack of experts in one part."""
    weights = []
    for part in parts:
        weight = part.read(device)
        if not part.is_stack and weight.values.dim() == 3:
            weight = weight.map(lambda tensor: tensor[0], also_order=False)
        weights.append(weight)
        for view in part.list_views():
            forget(view)
    return weights[0] if len(weights) == 1 else _join(weights, join_rows, parts[0].stored.name)


def _join(weights: Sequence[QuantisedWeight], join: Any, name: str) -> QuantisedWeight:
    joined: QuantisedWeight | None = join(weights) or join(list(_make_alike(weights)))
    if joined is None:
        raise EngineError(
            f"the experts beside {name} are quantised in different ways, which is not read; use --engine accelerate"
        )
    return joined


def _make_alike(weights: Sequence[QuantisedWeight]) -> Iterator[QuantisedWeight]:
    """Yields the same weights, all of them with zeros if some have them, and without scales of inputs that differ."""
    has_zeros = any(weight.zeros is not None for weight in weights)
    for weight in weights:
        zeros = weight.zeros
        if has_zeros and zeros is None:
            zeros = torch.full_like(weight.scales, ZERO_OF_INT4, dtype=torch.uint8)
        yield replace(weight, zeros=zeros, inputs_scale=None)


def _list_views(parameter: nn.Parameter) -> Iterator[torch.Tensor]:
    pieces = find_pieces(parameter)
    if pieces is None:
        yield parameter.data
        return
    for views in pieces.experts:
        yield from views
