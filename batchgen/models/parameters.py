"""The parameters of a model from its config alone: what ZeRO will shard, and what a token or a step reads of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from batchgen.models.definition.build import build_empty
from batchgen.models.footprint import find_experts_per_token
from batchgen.models.quantised.selection import choose_weights


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a model, as its module makes it."""

    numel: int  # elements as stored, each of the run's type
    shape: tuple[int, ...]  # as computed with
    tied: bool  # another name of one listed before
    quantizable: bool  # a weight that DeepSpeed's quantisation would take: of a linear layer or an embedding
    columns: int = 0  # inputs of the product, of a weight that `--dtype fp8`, int8 or int4 rounds; 0: it is kept
    # The part of it that one token is computed with: of the experts of a mixture, those that the token is sent to.
    token_share: float = 1.0


@dataclass(frozen=True)
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

    @cached_property
    def _elements(self) -> Mapping[float, int]:
        """The elements of all parameters, each counted under one of its names, by their `token_share`."""
        elements: Counter[float] = Counter()
        for parameter in self.by_name.values():
            elements[parameter.token_share] += 0 if parameter.tied else parameter.numel
        return elements

    @property
    def total(self) -> int:
        """The elements of all parameters, each once."""
        return sum(self._elements.values())

    @property
    def active(self) -> int:
        """The elements that one token is computed with: of a mixture of experts, those that it is sent to.

        Embedding and head count whole. Some makers of models count one of them, or none: their figures are smaller.
        """
        return round(sum(elements * share for share, elements in self._elements.items()))

    @property
    def experts(self) -> int:
        """The part of `total` that is experts which not every token is sent to; shared experts are none of them."""
        return sum(elements for share, elements in self._elements.items() if share < 1)

    @property
    def active_experts(self) -> int:
        """The part of `active` that is experts which not every token is sent to."""
        return self.active - (self.total - self.experts)

    @property
    def read_bytes(self) -> int:
        """The bytes of all parameters, each once: what a forward reads over all ranks, unless some experts are idle."""
        return self.total * self.dtype.itemsize

    def step_bytes(self, tokens: float) -> float:
        """Returns the bytes that a forward over this many tokens is expected to read, over all ranks.

        An expert is read if any token is sent to it. Where each token is sent to k of E experts, and each expert is as
        likely as the others, that is 1 - (1 - k/E)^tokens of them.
        """
        read = (elements * (1 - math.pow(1 - share, tokens)) for share, elements in self._elements.items())
        return sum(read) * self.dtype.itemsize

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
    chosen = find_experts_per_token(config)
    seen: set[int] = set()
    rounded = choose_weights(model)
    parameters = {}
    for module_name, module in model.named_modules():
        takes = type(module) in (torch.nn.Linear, torch.nn.Embedding)
        experts = _count_experts(module)
        share = min(1.0, chosen / experts) if chosen and experts else 1.0
        for name, value in module.named_parameters(recurse=False):
            path = f"{module_name}.{name}" if module_name else name
            quantizable = takes and name == "weight"
            shape, tied = tuple(value.shape), id(value) in seen
            columns = rounded[path].columns if path in rounded else 0
            parameters[path] = Parameter(value.numel(), shape, tied, quantizable, columns, share)
            seen.add(id(value))
    return Parameters(parameters, dtype)


def _count_experts(module: torch.nn.Module) -> int:
    """Returns how many experts a module holds; 0: it holds none. Theirs are the matrices of three dimensions, the first
    of which counts the experts, in modules whose class is named for them."""
    if not type(module).__name__.endswith("Experts"):
        return 0
    return max((value.shape[0] for _, value in module.named_parameters(recurse=False) if value.dim() == 3), default=0)
