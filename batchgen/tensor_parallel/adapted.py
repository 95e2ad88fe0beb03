"""An adapter over a model that is split: of each product of its small matrices, the part for a rank's shard.

Merged before the split, the weights would all have to be read into memory on every rank. AutoTP cuts by rows or by
columns, in ways of its own for each kind of model. Which ones a rank has is read off a model without weights that is
split the same way, whose "weights" are the numbers of their own rows, and of their columns.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from batchgen.models import lora
from batchgen.tensor_parallel.autotp import split
from batchgen.tensor_parallel.group import Group
from batchgen.tensor_parallel.split_files import build_hollow
from batchgen.tensor_parallel.weights import Additions


def find_additions(adapter: str, folder: str, config: Any, group: Group | None) -> Additions:
    """Returns what the adapter adds to the weights of this rank's share of the model in `folder`.

    Args:
        adapter: the folder of the adapter; "": none, and nothing is added.
        group: the ranks that share the model; None: this one has all of it.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    if not adapter:
        return {}
    places = lora.place_by_config(lora.read_adapter(adapter), config)
    changes = {name: change for name, change in places.whole.items() if change.is_low_rank}
    if group is None or len(group.ranks) == 1:
        return {name: change.compute_product for name, change in changes.items()}
    rows, columns = (_find_cut(folder, changes, group.model, dimension) for dimension in (0, 1))
    return {
        path: partial(changes[name].compute_product, rows=numbers, columns=columns[name, path])
        for (name, path), numbers in rows.items()
    }


class LayerCut(NamedTuple):
    """What a rank has of the weight of a layer, by numbers from 0 and in their order."""

    columns: torch.Tensor  # of its outputs, [columns of this rank]
    inputs: torch.Tensor  # [inputs of this rank]


def find_layer_cuts(folder: str, group: Group, layers: Collection[str]) -> dict[str, LayerCut]:
    """Returns what this rank has of these layers of the model in `folder`, split as `use_plain_layers` leaves it.

    Of projections that are fused in one layer, the shares lie one below the other, as the layer has them.

    Args:
        layers: the names of linear layers.

    Returns:
        By the layer; empty where a rank has the whole model.
    """
    if len(group.ranks) == 1:
        return {}
    names = [f"{layer}.weight" for layer in layers]
    rows, inputs = (_find_cut(folder, names, group.model, dimension) for dimension in (0, 1))
    cuts = {}
    for layer, name in zip(layers, names, strict=True):
        paths = [key for key in rows if key[0] == name]
        cuts[layer] = LayerCut(torch.cat([rows[key] for key in paths]), inputs[paths[0]])
    return cuts


def _find_cut(
    folder: str, names: Collection[str], group: dist.ProcessGroup, dimension: int
) -> dict[tuple[str, str], torch.Tensor]:
    """Returns which rows (`dimension` 0) or columns (1) of each named matrix this rank has, in their order.

    Returns:
        By the matrix's name and that of the parameter with these rows or columns: the share of a layer may be several.
    """
    model = build_hollow(Path(folder), torch.float32, None)
    for name in names:
        layer, _, own = name.rpartition(".")
        shape = model.get_parameter(name).shape
        # Views of one row or column: a matrix of them would need the memory of the weights. float32 counts to 2^24.
        numbers = torch.arange(shape[dimension], dtype=torch.float32).unsqueeze(1 - dimension).expand(shape)
        model.get_submodule(layer)._parameters[own] = nn.Parameter(numbers, requires_grad=False)
    split(model, group)
    found = {}
    for name in names:
        layer, _, own = name.rpartition(".")
        for path, parameter in model.named_parameters(remove_duplicate=False):
            if path.startswith(f"{layer}.") and path.endswith(f".{own}"):
                numbers = parameter.data
                found[name, path] = (numbers[:, 0] if dimension == 0 else numbers[0]).long()
    return found
