"""The parameters that ZeRO will shard, from a model's config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from batchgen.models.definition.build import build_empty


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a model, as its module makes it."""

    numel: int  # elements as stored, each of the run's type
    shape: tuple[int, ...]  # as computed with
    tied: bool  # another name of one listed before
    quantizable: bool  # a weight that DeepSpeed's quantisation would take: of a linear layer or an embedding


@dataclass(frozen=True, slots=True)
class Parameters:
    """All parameters of a model, by name.

    A tied parameter is here under each of its names: ZeRO shards a parameter when its module is made, and ties it to
    another one only afterwards, so that both are written out, and one is read.
    """

    by_name: Mapping[str, Parameter]
    dtype: torch.dtype

    @property
    def largest(self) -> int:
        """The elements of the largest parameter."""
        return max(parameter.numel for parameter in self.by_name.values())

    @property
    def tied(self) -> int:
        """The elements of the parameters that a forward uses under two names: an embedding that is the output, too."""
        return sum(parameter.numel for parameter in self.by_name.values() if parameter.tied)

    @property
    def largest_layer(self) -> int:
        """The elements of the largest layer; without layers, those of the largest parameter."""
        layers: Counter[str] = Counter()
        for name, parameter in self.by_name.items():
            layers[_find_layer(name)] += parameter.numel
        inside = [elements for name, elements in layers.items() if name.rpartition(".")[2].isdigit()]
        return max(inside, default=self.largest)

    @property
    def read_bytes(self) -> int:
        """The bytes that one forward needs, over all ranks: each parameter once."""
        return sum(parameter.numel for parameter in self.by_name.values() if not parameter.tied) * self.dtype.itemsize

    @property
    def shared_bytes(self) -> int:
        """The bytes that the ranks share where each of them holds tied parameters whole (`engines.ds_zero.gather`)."""
        return self.read_bytes - self.tied * self.dtype.itemsize

    def shards(self, ranks: int) -> list[int]:
        """Returns the elements of one rank's shard of each parameter, padded so that all ranks' shards are equal."""
        return [-(-parameter.numel // ranks) for parameter in self.by_name.values()]

    def shard_bytes(self, ranks: int) -> int:
        """Returns the bytes of all shards of one rank."""
        return sum(self.shards(ranks)) * self.dtype.itemsize

    def max_at_once(self, ranks: int, min_bytes: int, *, whole_layers: bool = False) -> int:
        """Returns how many parameters, whose shards have `min_bytes` or more, a forward can need at the same time.

        These are the parameters of one module, those of the modules around it, whose forward has not ended, and the
        tied ones, which may be kept from their first use to their last.

        Args:
            ranks: that share each parameter.
            min_bytes: what is smaller does not count.
            whole_layers: a layer (a module with a number for a name) is one module: all its parameters are needed.
        """
        own: Counter[str] = Counter()
        tied = 0
        for (name, parameter), shard in zip(self.by_name.items(), self.shards(ranks), strict=True):
            if shard * self.dtype.itemsize >= min_bytes:
                own[_find_layer(name) if whole_layers else name.rpartition(".")[0]] += 1
                tied += parameter.tied
        return tied + max((sum(own[around] for around in _list_enclosing(module)) for module in own), default=0)


def _find_layer(name: str) -> str:
    """Returns the name of the layer that a parameter is in; that of its own module, if it is in no layer."""
    parts = name.split(".")
    depth = next((place + 1 for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:depth])


def _list_enclosing(module: str) -> list[str]:
    """Returns a module's name and those of the modules that it is in: a.b, a, and the model itself."""
    parts = module.split(".") if module else []
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]


def list_parameters(config: Any, dtype: torch.dtype) -> Parameters:
    """Returns the parameters of the model with this Transformers config, which computes in `dtype`.

    The model is made on the meta device, without memory: files may hold parameters in other pieces than the model does
    (the experts of a mixture, one by one), and what counts is what ZeRO sees. Not to be called while a model is being
    sharded as it loads (Transformers' `HfDeepSpeedConfig` is alive): it would be sharded too.

    Raises:
        ModelError: Transformers has no causal language model of this kind, or cannot make it with these numbers.
    """
    model = build_empty(config, dtype)
    seen: set[int] = set()
    parameters = {}
    for module_name, module in model.named_modules():
        takes = type(module) in (torch.nn.Linear, torch.nn.Embedding)
        for name, value in module.named_parameters(recurse=False):
            path = f"{module_name}.{name}" if module_name else name
            quantizable = takes and name == "weight"
            parameters[path] = Parameter(value.numel(), tuple(value.shape), id(value) in seen, quantizable)
            seen.add(id(value))
    return Parameters(parameters, dtype)
