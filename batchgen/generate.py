"""`model.generate` of Transformers: the call, and what to say where Transformers cannot make it."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from batchgen.encoder import HfEncoder
from batchgen.engine import EngineError

# What code of Transformers raises that does not fit a model's config. Not RuntimeError, which devices and ranks raise.
_BROKEN = (AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError)


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

    Raises:
        EngineError: Transformers has a model of this kind, but cannot generate with it.
    """
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=encoder.pad_token,
        eos_token_id=(encoder.end_tokens or None) if end else None,
    )
    try:
        with torch.inference_mode():
            output: torch.Tensor = model.generate(**inputs, generation_config=config, **more)
    except _BROKEN as error:
        if not _is_raised_by_transformers(error):
            raise
        raise EngineError(
            f"Transformers {transformers.__version__} cannot generate with this model, which is of type "
            f"{encoder.config.model_type}: {type(error).__name__}: {' '.join(str(error).split())}. Another version "
            "may; or choose another model"
        ) from error
    return output


def _is_raised_by_transformers(error: Exception) -> bool:
    """Whether its own code has raised it, and not ours, or torch over what it was given."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "transformers"
