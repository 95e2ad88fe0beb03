"""The call of Transformers' `model.generate`, and what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Tokens


def generate_greedily(
    model: Any,
    tokenizer: HfTokenizer,
    inputs: Mapping[str, torch.Tensor],
    new_tokens: int,
    *,
    end: bool = True,
    **more: Any,
) -> torch.Tensor:
    """Token ids, [rows, longest prompt and new tokens].

    Args:
        inputs: ids, mask and positions, each [rows, longest prompt].
        new_tokens: of each row, most.
        end: a row ends at its end-of-sequence token, and is padded from there.
        more: passed on; processors may choose other tokens.
    """
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token,
        eos_token_id=(tokenizer.end_tokens or None) if end else None,
    )
    with torch.inference_mode():
        output: torch.Tensor = model.generate(**inputs, generation_config=config, **more)
    return output


def pad(rows: Sequence[Tokens], filler: int, device: torch.device, *, positions: bool) -> dict[str, torch.Tensor]:
    """Left-padded ids, mask and, for a model that takes them, positions; each [rows, longest row].

    Args:
        filler: the token id that fills a row.
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
