"""What Transformers' attention modules call in patched models, and what they may ask for.

Modules of Transformers ask `ALL_ATTENTION_FUNCTIONS` for a function by the name in their config. What a family wants of
attention stands in the arguments: the scale, a window, a cap on scores, sinks. An argument that `attend` does not know
is an error and never ignored, since the text would be wrong without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from batchgen.engines.paged.attention import attend
from batchgen.engines.paged.layout import AttentionShape
from batchgen.engines.paged.not_covered import NotCovered

NAME = "batchgen_paged"

# What some families hand on to every attention function, without a meaning for this one.
_WITHOUT_MEANING = frozenset(
    (
        "cache_position",
        "dropout",
        "logits_to_keep",
        "output_attentions",
        "output_router_logits",
        "position_ids",
        "use_cache",
    )
)


def _attention_interface(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What Transformers calls in each layer; the signature is theirs.

    Raises:
        NotCovered: the module asks for something that `attend` does not do.
    """
    if attention_mask is not None:
        raise NotCovered("its attention has a mask of its own")
    for name, given in others.items():
        if given is not None and given is not False and name not in _WITHOUT_MEANING:
            raise NotCovered(f"its attention has an argument {name} that is not known here")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise NotCovered("its tokens attend to those behind them, too")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shape = AttentionShape(scale, sliding_window or 0, softcap=softcap or 0.0, sinks=s_aux)
    return attend(query, key, value, module.layer_number, shape), None


# Warning: for the whole process. The function serves patched models alone (`patching`): others keep the name of their
# own attention in their config, and must never be given this one.
ALL_ATTENTION_FUNCTIONS.register(NAME, _attention_interface)
