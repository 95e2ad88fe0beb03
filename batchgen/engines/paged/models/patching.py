"""Patches a loaded model of Transformers: its attention, its experts and its linear layers are ours afterwards."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from batchgen.engine import EngineError, Peers
from batchgen.engines.paged import adapters, experts, linear
from batchgen.engines.paged.layout import record_adapted, record_windows
from batchgen.engines.paged.models import bloom, falcon, longrope, mpt
from batchgen.engines.paged.models.interface import NAME
from batchgen.engines.paged.models.structure import Logits, find_body, find_layers
from batchgen.engines.paged.quantised.held import hold_experts
from batchgen.models.quantised.places import widen_all

_OWN_ATTENTION = {"bloom": bloom.patch, "falcon": falcon.patch, "mpt": mpt.patch}
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class PatchedModel:
    """The parts of a model whose attention is `attention.attend`.

    It runs inside `layout.lay_out`, or as plain causal attention over one sequence. `generate`, padding masks and
    caches of Transformers do not work with it any more, and it cannot be patched back.
    """

    model: Any
    body: Any  # makes the last hidden states of token ids
    layers: list[nn.Module]  # in order
    compute_logits: Logits

    def compute_hidden(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Returns the last hidden states, [tokens, hidden size].

        Args:
            ids: of the tokens of all sequences of a step, [tokens].
            positions: of each in its sequence, [tokens]; below 0: padding.
        """
        arguments: dict[str, Any] = {}
        if self.takes_positions:
            arguments["position_ids"] = positions.clamp(min=0).long()[None]
        hidden: torch.Tensor = self.body(input_ids=ids[None], use_cache=False, **arguments).last_hidden_state[0]
        return hidden

    def find_windows(self) -> list[int]:
        """Returns the window that attention has in each layer, in tokens, by a forward of a token; 0: none.

        Ranks that hold the model together call this together.
        """
        windows: dict[int, int] = {}
        with record_windows(windows):
            self._compute_token()
        return [windows.get(layer, 0) for layer in range(len(self.layers))]

    def check_adapters(self) -> None:
        """Checks, by a forward of a token, that each layer with adapters is called, as `find_windows` does.

        Raises:
            EngineError: one is not.
        """
        layers = {name: adapters.get_adapters(module) for name, module in self.model.named_modules()}
        adapted = {name: found.up.data_ptr() for name, found in layers.items() if found is not None}
        if adapted:
            called: set[int] = set()
            with record_adapted(called):
                self._compute_token()
            if missing := sorted(name for name, address in adapted.items() if address not in called):
                raise EngineError(
                    f"a {self.model.config.model_type} model computes without calling its layer {missing[0]}, so that "
                    "a row cannot have an adapter there; give its rows a run of their own, in which --adapter FOLDER "
                    "merges it"
                )

    def _compute_token(self) -> None:
        device = self.model.device
        with torch.inference_mode():
            self.compute_hidden(torch.zeros(1, dtype=torch.long, device=device), torch.zeros(1, device=device))

    @cached_property
    def takes_positions(self) -> bool:
        """Whether the body is told of positions; those with ALiBi are not."""
        return "position_ids" in inspect.signature(type(self.body).forward).parameters


# Warning: `patch` changes modules and a config that Transformers has made.
#
# Why: the tokens of a step belong to many sequences, and their keys and values to pages. No interface of Transformers
# has room for that, so its attention asks `attention.attend`, which finds the layout of the step by itself.
#
# What breaks: a model whose attention does not ask the interface, or counts positions by itself, would give wrong text
# without an error. That is why a model is patched only after `trial.check` has compared a small one of the same config
# with Transformers itself.


def patch(model: Any, peers: Peers) -> PatchedModel:
    """Gives the attention of a loaded model to `attention.attend`, and its linear layers to `linear`.

    Weights of its linear layers and experts that are quantised stay so; other ones are widened.

    Args:
        model: its layers have the adapters that rows may have (`adapters.install`).
        peers: the ranks that hold the model together; `model` is this one's shard, with as many heads as each has.

    Raises:
        NotCovered: a part of the model is not where it should be.
    """
    text = model.config.get_text_config()
    body = find_body(model)
    layers = find_layers(body, text.num_hidden_layers)
    if text.model_type in _OWN_ATTENTION:
        _OWN_ATTENTION[text.model_type](body, layers, peers)
    longrope.patch(body)
    experts.install(model)
    hold_experts(model)
    for number, layer in enumerate(layers):
        # A number would be a constant to the compiler, which would then compile each layer anew.
        layer_number = torch.tensor([number])
        for module in list(layer.modules()):
            module.layer_number = layer_number
            for names in _SAME_INPUT:
                linear.join_layers(module, names)
        linear.replace_layers(layer)
    logits = Logits(model)
    linear.replace_layers(model.get_output_embeddings())
    for module in list(model.modules()):
        if adapters.get_adapters(module) is not None:  # some may be outside of the layers
            linear.replace_layers(module)
    model.config._attn_implementation = text._attn_implementation = NAME
    widen_all(model)  # what is quantised outside of the layers, and where a layer computes more than a product
    patched = PatchedModel(model, body, layers, logits)
    patched.check_adapters()
    return patched
