"""DeepSpeed's configuration of ZeRO stage 3, and the user's own over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from batchgen.engine import EngineError


def configuration(world_size: int, hidden: int, dtype: torch.dtype, **sizes: int | None) -> dict[str, Any]:
    """DeepSpeed's configuration of ZeRO stage 3 for inference.

    The sizes are those of huggingface/transformers-bloom-inference (bloom-ds-zero-inference.py), unless given.

    Args:
        hidden: the model's hidden size.
        sizes: of DeepSpeed's section `zero_optimization`, in elements; None: the default.
    """
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 0,
    }
    zero |= {name: size for name, size in sizes.items() if size is not None}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        # DeepSpeed wants them to fit together, for inference too.
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1 << 30,
    }


def user_configuration(path: str) -> dict[str, Any]:
    """The user's own DeepSpeed JSON.

    Raises:
        EngineError: it cannot be read, or is of another stage.
    """
    try:
        config = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise EngineError(f"config={path}: cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("zero_optimization", {}).get("stage", 3) != 3:
        raise EngineError(f"config={path}: must be a DeepSpeed configuration of ZeRO stage 3")
    return config


def merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """`ours` with `theirs` over it, section by section."""
    both_of = dict(ours)
    for name, value in theirs.items():
        both = isinstance(value, dict) and isinstance(ours.get(name), dict)
        both_of[name] = merged(ours[name], value) if both else value
    return both_of
