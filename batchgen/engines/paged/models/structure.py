"""Where the parts of a model of Transformers are: its body, its layers, and what makes logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from batchgen.engines.paged.not_covered import NotCovered


def find_body(model: Any) -> Any:
    """Returns the module that turns token ids into hidden states, without the output matrix and without what sees.

    Raises:
        NotCovered: the model names no such module.
    """
    body = model.get_decoder()
    if body is model or isinstance(body, nn.Linear) or body.get_output_embeddings() is not None:
        body = model.base_model
        if body is model:
            body = getattr(model, "model", None)
    if body is None or not hasattr(body, "forward"):
        raise NotCovered("it does not say which of its modules is the decoder")
    return body


def find_layers(body: nn.Module, count: int) -> list[nn.Module]:
    """Returns the decoder layers of a body, in order; `count` is what the config says.

    Raises:
        NotCovered: there is no list of so many layers, or there are several.
    """
    lists = [module for module in body.children() if isinstance(module, nn.ModuleList) and len(module) == count]
    if len(lists) != 1:
        raise NotCovered(f"its decoder has no single list of {count} layers")
    return list(lists[0])


class Logits:
    """Makes logits from the last hidden states, as the model's own `forward` does behind its body.

    The config says what is done to the product with the output matrix: Cohere multiplies it by `logit_scale`, Granite
    and MiniCPM3 divide it by `logits_scaling`, and Gemma 2 caps it: `cap * tanh(logits / cap)` with
    `final_logit_softcapping`. What a family does besides, the check at load finds.
    """

    def __init__(self, model: Any) -> None:
        text = model.config.get_text_config()
        self._head = model.get_output_embeddings()
        if self._head is None:
            raise NotCovered("it has no output matrix")
        self._scale = float(getattr(text, "logit_scale", None) or 1) / float(getattr(text, "logits_scaling", None) or 1)
        self._cap = float(getattr(text, "final_logit_softcapping", None) or 0)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the logits of hidden states [tokens, hidden size]: [tokens, vocabulary]."""
        logits: torch.Tensor = self._head(hidden)
        if self._scale != 1:
            logits = logits * self._scale
        if self._cap:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits
