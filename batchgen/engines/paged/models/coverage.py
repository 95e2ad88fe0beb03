"""Whether models of a config are covered: by what the config says, and by a trial of a small one."""

from __future__ import annotations

import json
from typing import Any

import torch

from batchgen.engine import EngineError
from batchgen.engines.paged.attention import LARGEST_FLOAT32_HEAD, LARGEST_HEAD
from batchgen.engines.paged.models import longrope, trial
from batchgen.models import architectures, footprint
from batchgen.models.architectures import OF_THE_LONGEST, model_class

_KINDS_OF_LAYERS = {"full_attention", "sliding_attention"}
_MOST_TOKEN_BYTES = 2 << 20  # of the cache, in 16 bits: a fifteenth of an 80 GB card for a row of 2,500 tokens
_trials: dict[str, str] = {}


def why_refused(config: Any) -> str:
    """Returns what of this config pages of keys and values cannot hold; "" if nothing is known against it."""
    if architectures.why_refused(config):
        return architectures.why_refused(config)
    try:
        text = config.get_text_config()
    except ValueError:  # so Transformers says that there are several
        return "it has several parts that take text"
    if model_class(config) is None or getattr(text, "is_encoder_decoder", False):
        return "it is no decoder that Transformers continues texts with"
    kinds = set(getattr(text, "layer_types", None) or ()) - _KINDS_OF_LAYERS
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}, whose state is not kept in pages"
    longest = _find_rope_types(text) & set(OF_THE_LONGEST) - {longrope.TYPE}
    if longest:
        return f"its rotary positions are of type {longest.pop()}, which hang on the longest row of a step"
    if getattr(text, "use_bidirectional_attention", False):
        return "its tokens attend to those behind them, too"
    if getattr(text, "num_kv_shared_layers", 0):
        return f"its last {text.num_kv_shared_layers} layers attend to keys and values of layers before them"
    heads, size = footprint.cached_heads(config)
    if not heads:
        return "it has no attention heads, and keeps a state instead"
    if size > LARGEST_HEAD:
        return f"its heads have {size} numbers, of which the kernels take {LARGEST_HEAD}"
    kept = footprint.CacheFormat(2)
    token_bytes = footprint.cache_bytes_per_token(config, kept) if getattr(text, "kv_lora_rank", None) else 0
    if token_bytes > _MOST_TOKEN_BYTES:
        mebibytes = f"{token_bytes / 2**20:.1f} MiB"
        return f"its latent attention is kept as whole keys and values here, which take {mebibytes} a token"
    return ""


def _find_rope_types(text: Any) -> set[str]:
    """Returns the types of rotary positions, which some families have for each kind of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    # "dynamic" with an alpha is a fixed factor (Hunyuan), which does not hang on any row's length.
    return {str(part["rope_type"]) for part in parts if part.get("rope_type") and not part.get("alpha")}


def covers(config: Any) -> bool:
    """Returns whether models of this config are covered, by a trial on the CPU that takes about a second."""
    return not why_refused(config) and not _try_once(config)


def check_dtype(config: Any, dtype: torch.dtype) -> None:
    """Checks that the kernels of a GPU take the heads of the model in this type.

    Raises:
        EngineError: they do not; the message says what to use instead.
    """
    _, size = footprint.cached_heads(config)
    if dtype == torch.float32 and size > LARGEST_FLOAT32_HEAD:
        why = f"its heads have {size} numbers, of which the kernels take {LARGEST_FLOAT32_HEAD} in float32"
        raise EngineError(f"{trial.word_refusal(config, why)}, or --dtype bfloat16")


def check(config: Any) -> None:
    """Checks the config alone; the engine makes a trial afterwards (`trial.check`).

    Raises:
        EngineError: models of this config are not covered; the message says why and what to use instead.
    """
    why = why_refused(config)
    if why:
        raise EngineError(trial.word_refusal(config, why))


def _try_once(config: Any) -> str:
    key = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _trials:
        _trials[key] = trial.find_difference(config)
    return _trials[key]
