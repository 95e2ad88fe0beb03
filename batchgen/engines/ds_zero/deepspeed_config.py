"""DeepSpeed's configuration of ZeRO stage 3, and the user's own over it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from batchgen.engine import EngineError
from batchgen.models.parameters import Parameters

_EVERYTHING = sys.maxsize  # DeepSpeed's own word for no limit


def make_bucket_sizes(weights: Parameters, hidden: int, *, whole_layers: bool, whole_model: bool) -> dict[str, int]:
    """Returns DeepSpeed's sizes for a model, in elements, by their names in its section `zero_optimization`.

    The buckets are those of huggingface/transformers-bloom-inference (bloom-ds-zero-inference.py), but with
    `whole_layers` a layer is fetched ahead, and not a matrix: a step is then bound by the way that weights come over.

    Args:
        hidden: the model's hidden size.
        whole_layers: a decoder layer is gathered at once.
        whole_model: each rank has all of it in its place anyhow (one rank, no offload): nothing is ever let go.
    """
    layer = weights.largest_layer
    return {
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": layer if whole_layers else int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": _EVERYTHING if whole_model else 0,
        # This layer, the next one, and what is on its way; and a tied embedding, which stays from its first use to its
        # second. With DeepSpeed's 1e9 the one of BLOOM-7b1 alone would keep every layer from being fetched ahead.
        "stage3_max_live_parameters": weights.tied + (3 * layer if whole_layers else max(3 * layer, 1_000_000_000)),
        # Weights that a forward uses twice come over once. Others are not concerned: no forward uses them again.
        "stage3_max_reuse_distance": _EVERYTHING,
    }


def estimate_gathered_bytes(weights: Parameters) -> int:
    """Returns the most bytes of gathered weights that a rank holds at a time.

    The largest parameter alone (an embedding, the output matrix), and layers: this one, the next one, one on its way,
    and the flat buffer that it arrives in.
    """
    return (max(weights.largest, weights.tied) + 4 * weights.largest_layer) * weights.dtype.itemsize


def make_configuration(world_size: int, dtype: torch.dtype, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Returns DeepSpeed's configuration of ZeRO stage 3 for inference."""
    stage = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True}
    return {
        "zero_optimization": {**stage, **sizes},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        # DeepSpeed wants them to fit together, for inference too.
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1 << 30,
    }


def remove_backward_hooks(engine: Any) -> None:
    """Removes from DeepSpeed's engine what only a backward pass needs.

    It wraps every tensor that enters or leaves a module, which is a third of the time of a small step.
    """
    # Warning: private lists and a global of DeepSpeed are changed. Without it all is right and slower. A version that
    # fetches weights in the same hooks would compute with empty weights, and fail; one that has no such list raises
    # AttributeError here. Nothing of this process can train a model any more.
    for hook in engine.optimizer.backward_hooks:
        hook.remove()
    engine.optimizer.backward_hooks.clear()
    # Marks in a profiler's timeline, four calls for each of thousands of a step; by its full name, because the package
    # has a function of the module's name.
    sys.modules["deepspeed.utils.nvtx"].enable_nvtx = False  # type: ignore[attr-defined]


def read_user_configuration(path: str) -> dict[str, Any]:
    """Reads the user's own DeepSpeed JSON.

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


def merge(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Returns `ours` with `theirs` over it, section by section."""
    both_of = dict(ours)
    for name, value in theirs.items():
        both = isinstance(value, dict) and isinstance(ours.get(name), dict)
        both_of[name] = merge(ours[name], value) if both else value
    return both_of
