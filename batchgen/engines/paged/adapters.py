"""Adapters by row: what each token's own LoRA adapter adds to the product of a linear layer.

An adapter is a pair of small matrices for each layer, A [rank, depth] and B [columns, rank]; a layer with the weight W
computes W x + B A x (https://arxiv.org/abs/2106.09685, section 4.1; the factor alpha / rank is in B). W x is computed
for all tokens of a step at once, and the rest like experts, of which each token has one or none (`experts`):

    tokens ─sort_by_adapter, once a step→ tokens by adapter
           ─grouped_gemm.multiply→ A x of each ─grouped_gemm.multiply→ B A x of each ─combining.combine→ in their order
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from batchgen.engine import EngineError
from batchgen.engines.paged.experts import combining, grouped_gemm, routing
from batchgen.engines.paged.layout import AdapterRows, get_current_adapter, get_current_layout, note_adapted
from batchgen.models.lora import Change, read_row_adapters
from batchgen.tensor_parallel import LayerCut

_ALIGN = 16
"""Ranks are filled up with zeros to a multiple of it: rows of 16 bytes and more are read at once."""


class LayerAdapters(NamedTuple):
    """What all adapters add to one linear layer; one that does not change it has zeros."""

    down: torch.Tensor  # A of each, [adapters, rank, depth]
    up: torch.Tensor  # B of each, with its factor, [adapters, columns, rank]


def install(
    model: Any,
    folders: Mapping[str, str],
    config: Any,
    find_cuts: Callable[[Collection[str]], Mapping[str, LayerCut]] = lambda layers: {},
) -> None:
    """Reads the adapters that rows may have, and gives them to the layers of a loaded model that is not yet patched.

    All layers get the same rank, so that the compiler takes them for the same code.

    Args:
        folders: of the adapters, by their names; their numbers are in this order.
        config: Transformers' config of the model.
        find_cuts: finds what this rank has of layers, by their names; those that it leaves out are whole.

    Raises:
        ModelError: one cannot be read, or does more than to add products to linear layers.
    """
    if not folders:
        return
    found = read_row_adapters(folders, config)
    rank, cuts = -(-found.rank // _ALIGN) * _ALIGN, find_cuts(found.changes)
    for name, changes in found.changes.items():
        layer, stacked = model.get_submodule(name), stack(changes, rank, cuts.get(name))
        given = LayerAdapters(*(each.to(model.device, model.dtype) for each in stacked))
        set_adapters(getattr(layer, "share", layer), given)  # where ranks share it, the product of this one


def set_adapters(layer: nn.Module, given: LayerAdapters | None) -> None:
    """Gives a layer the adapters that rows may have, before it is joined or replaced; None: it has none."""
    if given is not None:
        layer.register_buffer("adapters_down", given.down, persistent=False)
        layer.register_buffer("adapters_up", given.up, persistent=False)


def get_adapters(layer: nn.Module) -> LayerAdapters | None:
    """Returns the adapters that rows may have of a layer; None: it has none."""
    down, up = getattr(layer, "adapters_down", None), getattr(layer, "adapters_up", None)
    return None if down is None or up is None else LayerAdapters(down, up)


def stack(changes: Sequence[Change | None], rank: int, cut: LayerCut | None = None) -> LayerAdapters:
    """Makes one tensor of A, and one of B, in float32, of what several adapters change in one layer.

    Args:
        changes: one of each adapter, each `is_low_rank`; None: it does not change the layer. One at least does.
        rank: of the result.
        cut: what this rank has of the layer; None: all of it.
    """
    columns, depth = next(
        (len(change.up), change.down.shape[1])
        for change in changes
        if change is not None and change.up is not None and change.down is not None
    )
    down, up = torch.zeros(len(changes), rank, depth), torch.zeros(len(changes), columns, rank)
    for number, change in enumerate(changes):
        if change is not None and change.up is not None and change.down is not None:
            down[number, : len(change.down)] = change.down.float()
            up[number, :, : change.up.shape[1]] = change.scale * change.up.float()
    return LayerAdapters(down, up) if cut is None else LayerAdapters(down[..., cut.inputs], up[:, cut.columns])


def join(parts: Sequence[LayerAdapters | None], columns: Sequence[int]) -> LayerAdapters | None:
    """Makes one layer's adapters of those of layers with the same input, whose outputs lie side by side.

    B has blocks, one for each layer, and zeros elsewhere: two products in the place of two for each layer.

    Args:
        parts: of the layers; None: no adapter changes that one.
        columns: of each layer.

    Returns:
        The adapters of all of them; None: no adapter changes any.
    """
    known = [part for part in parts if part is not None]
    if not known:
        return None
    count, rank, _ = known[0].down.shape
    up = known[0].up.new_zeros((count, sum(columns), rank * len(known)))
    first = block = 0
    for part, width in zip(parts, columns, strict=True):
        if part is not None:
            up[:, first : first + width, block * rank : (block + 1) * rank] = part.up
            block += 1
        first += width
    return LayerAdapters(torch.cat([part.down for part in known], 1), up)


def sort_by_adapter(numbers: torch.Tensor, adapters: int) -> AdapterRows:
    """Sorts tokens by their adapters; those without one come last.

    Args:
        numbers: of the adapter of each token, from 1; 0: none. [tokens], int32.
        adapters: how many there are.
    """
    places = torch.where(numbers > 0, numbers - 1, adapters)[:, None]
    order, inverse, offsets = routing.sort_by_expert(places, adapters)
    ones = torch.ones_like(places, dtype=torch.float32)
    return AdapterRows(places, order, offsets, inverse[:, None], ones)


def add_to(output: torch.Tensor, inputs: torch.Tensor, layer: LayerAdapters) -> None:
    """Adds to `output`, in place, what each token's adapter adds to a layer's product; nothing where no token has one.

    Which adapters the tokens have stands in the current layout; without a layout, all have the same (`use_adapter`).

    Args:
        output: [..., columns].
        inputs: [..., depth].

    Raises:
        EngineError: the layer is not given the tokens of the step, one row each.
    """
    note_adapted(layer.up.data_ptr())
    columns, depth = layer.up.shape[1], layer.down.shape[2]
    tokens = inputs.reshape(-1, depth)
    rows = _find_rows(tokens, len(layer.down))
    if rows is None:
        return
    if len(rows.numbers) != len(tokens):
        raise EngineError(
            f"a layer of this model with an adapter computes {len(tokens)} rows for the {len(rows.numbers)} tokens of "
            "a step, so that rows cannot have adapters of their own; merge one with --adapter FOLDER"
        )
    sorting = grouped_gemm.Sorting(rows.order, rows.offsets, 1)
    inner = grouped_gemm.multiply(tokens, layer.down, None, sorting)
    added = grouped_gemm.multiply(inner, layer.up, None, sorting._replace(top_k=0))
    combined = combining.combine(added, rows.places, rows.weights, rows.numbers, len(layer.down))
    output.view(-1, columns).add_(combined)


def _find_rows(tokens: torch.Tensor, adapters: int) -> AdapterRows | None:
    layout = get_current_layout()
    if layout is not None:
        return layout.adapters
    number = get_current_adapter()
    if not number:
        return None
    return sort_by_adapter(torch.full((len(tokens),), number, dtype=torch.int32, device=tokens.device), adapters)
