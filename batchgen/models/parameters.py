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
    """One parameter as a module makes it."""

    numel: int  # elements as stored, each of the run's type
    shape: tuple[int, ...]  # as computed with
    tied: bool  # another name of one listed before
    quantizable: bool  # a weight that DeepSpeed's quantisation would take: of a linear layer or an embedding


@dataclass(frozen=True, slots=True)
class Parameters:
    """All parameters of a model, by name. Tied ones are there under each of their names: ZeRO shards a parameter when
    its module is made, and ties it to another only afterwards, so that both are written out, and one is read."""

    by_name: Mapping[str, Parameter]
    dtype: torch.dtype

    @property
    def largest(self) -> int:
        """Elements of the largest one."""
        return max(parameter.numel for parameter in self.by_name.values())

    @property
    def tied(self) -> int:
        """Elements of those that a forward uses under two names: an embedding that is the output matrix too."""
        return sum(parameter.numel for parameter in self.by_name.values() if parameter.tied)

    @property
    def largest_layer(self) -> int:
        """Elements of the largest layer, or of the largest parameter that is in none."""
        layers: Counter[str] = Counter()
        for name, parameter in self.by_name.items():
            layers[_find_layer(name)] += parameter.numel
        inside = [elements for name, elements in layers.items() if name.rpartition(".")[2].isdigit()]
        return max(inside, default=self.largest)

    @property
    def read_bytes(self) -> int:
        """Bytes that one forward needs, over all ranks: each parameter once."""
        return sum(parameter.numel for parameter in self.by_name.values() if not parameter.tied) * self.dtype.itemsize

    @property
    def shared_bytes(self) -> int:
        """Bytes that the ranks share where each of them holds tied parameters whole (`engines.ds_zero.gather`)."""
        return self.read_bytes - self.tied * self.dtype.itemsize

    def shards(self, ranks: int) -> list[int]:
        """Elements of one rank's shard of each parameter, padded so that all ranks' are equal."""
        return [-(-parameter.numel // ranks) for parameter in self.by_name.values()]

    def shard_bytes(self, ranks: int) -> int:
        """Bytes of one rank's shards together."""
        return sum(self.shards(ranks)) * self.dtype.itemsize

    def max_at_once(self, ranks: int, min_bytes: int, *, whole_layers: bool = False) -> int:
        """Parameters that a forward can need at the same time, of those whose shards have `min_bytes` or more.

        Those of one module, and of the modules around it, whose forward has not ended; and the tied ones, which may be
        kept from their first use to their last.

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
    """The name of the layer that a parameter is in; of its own module, if it is in none."""
    parts = name.split(".")
    depth = next((place + 1 for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:depth])


def _list_enclosing(module: str) -> list[str]:
    """A module's name and those of the modules it is in: a.b, a, and the model itself."""
    parts = module.split(".") if module else []
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]


def list_parameters(config: Any, dtype: torch.dtype) -> Parameters:
    """The parameters of the model with this Transformers config, computed with in `dtype`.

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
