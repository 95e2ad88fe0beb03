"""What Transformers calls for the experts of a layer, and how a model is told to call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from batchgen.engines.paged.experts import combining, grouped_gemm, routing
from batchgen.engines.paged.not_covered import NotCovered

NAME = "batchgen_experts"

HELD = "held_"
"""Begins the attribute of a module of experts that holds a quantised weight, before the name of its parameter; see
`quantised.held.hold_experts`."""

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What Transformers says of a family's experts, and `compute_experts` knows. It need not look at `is_concatenated`:
the family's own `_apply_gate` knows how gate and up are laid out."""


# Warning: `install` changes the config of a model that Transformers has made, and this module registers a function of
# experts there.
#
# Why: Transformers' own loop over experts waits for the GPU to learn which were chosen, so that a step can be neither
# compiled as a whole nor captured; its `grouped_mm` does so for every type but bfloat16.
#
# What breaks:
# - `compute_experts` reads `gate_up_proj` (`up_proj` without a gate), `down_proj`, their `_bias`, `_apply_gate`,
#   `act_fn` and the flags above, which the class decorator `use_experts_implementation` sets (the same in
#   Transformers 5.17 and 5.23). A version that renames one raises AttributeError; one that adds a step to experts
#   (5.23: a norm behind them) has to flag it, and `_check` refuses flags that it does not know.
# - Experts that are not behind that decorator (Llama 4, DBRX, JetMoe, LongCat-Flash) go on as they are.


def install(model: nn.Module) -> int:
    """Makes the experts of a loaded model compute by `compute_experts`.

    Returns:
        How many modules of experts the model has that ask Transformers' interface: 0 for a dense model.

    Raises:
        NotCovered: the experts of this family do something that `compute_experts` does not know.
    """
    modules: list[Any] = [module for module in model.modules() if asks_the_interface(module)]
    for module in modules:
        _check(module)
    for module in modules:
        module.config._experts_implementation = NAME
    return len(modules)


def asks_the_interface(module: nn.Module) -> bool:
    """Whether a module is a family's experts, and computes by what its config names."""
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate")


def name_up(module: Any) -> str:
    """The parameter that the first product of a module of experts is of."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _check(module: Any) -> None:
    """Raises NotCovered if the module has a flag that is unknown here, and set."""
    flags = {name for name, value in vars(module).items() if name.startswith(("has_", "is_")) and value is True}
    unknown = sorted(flags.difference(_FLAGS))
    if unknown:
        raise NotCovered(f"its experts ({type(module).__name__}) say {', '.join(unknown)}, which is not known here")


def compute_experts(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs for each token. The signature is Transformers'.

    The tokens that fill a captured step up to its size are routed like others. If they are equal, they choose the same
    K experts: what they cost is the reading of those that no other token has chosen, and rows in a few tiles.

    Args:
        module: the family's module of experts, with weights of all of them, [experts, …].
        hidden: [tokens, width].
        top_k_index: which experts, [tokens, K]. A number that is no expert's (Transformers' expert parallelism gives
            the count of experts to those of other ranks) adds nothing to the sum.
        top_k_weights: [tokens, K], any floating type.

    Returns:
        [tokens, width], in the type of `hidden`.
    """
    down, top_k = module.down_proj, top_k_index.shape[1]
    order, inverse, offsets = routing.sort_by_expert(top_k_index, len(down))
    sorting = grouped_gemm.Sorting(order, offsets, top_k)
    inner = _multiply(module, name_up(module), hidden.to(down.dtype), sorting)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outputs = _multiply(module, "down_proj", inner, sorting._replace(top_k=0))
    places = inverse.view_as(top_k_index)
    return combining.combine(outputs, places, top_k_weights, top_k_index, len(down)).to(hidden.dtype)


def _multiply(module: Any, name: str, inputs: torch.Tensor, sorting: grouped_gemm.Sorting) -> torch.Tensor:
    """The products of sorted pairs with the parameter `name` of a module of experts, plain or quantised."""
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    held = getattr(module, HELD + name, None)
    if held is not None:
        output: torch.Tensor = held.multiply_grouped(inputs, bias, sorting)
        return output
    weight = getattr(module, name)
    return grouped_gemm.multiply(inputs, weight.transpose(1, 2) if module.is_transposed else weight, bias, sorting)


# Warning: for the whole process, as the attention of `models`. Models that are not patched keep the name of their own.
ALL_EXPERTS_FUNCTIONS.register(NAME, compute_experts)
