"""The call of Transformers' `model.generate`, and what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Tokens


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model of Transformers that is ready to generate."""

    model: Any  # in eval mode
    tokenizer: HfTokenizer  # the same model's
    device: torch.device  # where token ids go; not read off the model, whose first layers may lie on a disk
    generate_kwargs: Mapping[str, Any] = field(default_factory=dict)  # passed on to `model.generate`


def generate_greedily(
    loaded: LoadedModel, inputs: Mapping[str, torch.Tensor], new_tokens: int, *, end: bool = True, **more: Any
) -> torch.Tensor:
    """Calls `model.generate`; returns token ids, [rows, longest prompt + new tokens].

    Args:
        inputs: token ids, mask and positions, each [rows, longest prompt].
        new_tokens: the most that a row generates.
        end: a row ends at its end-of-sequence token, and is padded from there.
        more: passed on to `model.generate`; logits processors in it may choose other tokens than the best.
    """
    tokenizer = loaded.tokenizer
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token,
        eos_token_id=(tokenizer.end_tokens or None) if end else None,
    )
    with torch.inference_mode():
        output: torch.Tensor = loaded.model.generate(
            **inputs, generation_config=config, **loaded.generate_kwargs, **more
        )
    return output


def pad(rows: Sequence[Tokens], filler: int, device: torch.device, *, positions: bool) -> dict[str, torch.Tensor]:
    """Returns token ids, left-padded, and their mask; each [rows, longest row].

    Args:
        filler: the token id that fills a row.
        positions: the model takes position ids: they are returned, too.
    """
    width = max(map(len, rows))
    gaps = [width - len(tokens) for tokens in rows]
    ids = torch.tensor([[filler] * gap + list(tokens) for gap, tokens in zip(gaps, rows, strict=True)])
    mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if positions:
        # `generate` appends the following positions itself at each step.
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return {name: tensor.to(device) for name, tensor in inputs.items()}
