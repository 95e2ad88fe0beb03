"""The call of Transformers' `model.generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig

from batchgen.encoder import HfEncoder


def generate_greedily(
    model: Any,
    encoder: HfEncoder,
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
        pad_token_id=encoder.pad_token,
        eos_token_id=(encoder.end_tokens or None) if end else None,
    )
    with torch.inference_mode():
        output: torch.Tensor = model.generate(**inputs, generation_config=config, **more)
    return output
