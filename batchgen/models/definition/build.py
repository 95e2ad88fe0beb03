"""The model of a config without its weights: whether Transformers can make it, and what shapes it has."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from batchgen.models import architectures
from batchgen.models.definition.errors import ModelError, refuse_errors
from batchgen.models.definition.model_config import read_config
from batchgen.models.definition.weights import tensor_shapes
from batchgen.models.quantised.checkpoint import find_checkpoint

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")


def build_empty(config: Any, dtype: torch.dtype | None = None, **arguments: Any) -> Any:
    """The model of this Transformers config on the meta device, without memory.

    Not to be called while a model is being sharded as it loads (Transformers' `HfDeepSpeedConfig` is alive): it would
    be sharded too.

    Args:
        dtype: of its weights; None: the config's own.
        arguments: for `from_config`.

    Raises:
        ModelError: Transformers has no language model of this kind, or cannot make it with these numbers.
    """
    make = architectures.auto_class(config)
    if make is None:
        raise ModelError(f"Transformers has no language model of type {config.model_type}; choose another model")
    place = f" in {config.name_or_path}" if config.name_or_path else f" of type {config.model_type}"
    if dtype is not None:
        arguments["dtype"] = dtype
    with refuse_errors(f"the config of the model{place} cannot be used"):
        # Imports the model's module, which must not happen inside the block: its constants would be on the meta device.
        architectures.model_class(config)
        try:
            with torch.device("meta"):
                return make.from_config(copy.deepcopy(config), trust_remote_code=False, **arguments)
        except Exception as error:  # the code of hundreds of architectures meets numbers that nobody has tried
            field = _find_field(config.get_text_config())
            if field is None:
                raise
            raise ModelError(f"the config of the model{place} cannot be used: config.json: {field}") from error


def _find_field(text: Any) -> str | None:
    """What is wrong with a config of which no model can be made, in fields that are often wrong; None: not known."""
    pad, size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        return f"pad_token_id is {pad}, but the model has {size} tokens (0 to {size - 1})"
    for name in _ACTIVATIONS:
        value = getattr(text, name, None)
        if isinstance(value, str) and value not in ACT2FN:
            return f"{name} {value!r} is not known to Transformers"
    hidden, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
    if isinstance(hidden, int) and isinstance(heads, int) and (heads < 1 or hidden % heads):
        return f"num_attention_heads is {heads}, which does not divide hidden_size, {hidden}"
    return None


def explain_shapes(folder: Path, error: Exception) -> str | None:
    """Which weights have another shape than the config says, if that is what `error` of a load is about; else None."""
    if "mismatch" not in str(error) or not isinstance(error, RuntimeError):
        return None
    if is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call]  # a model that is made now would be sharded
        return "its weights have other shapes than its config.json says"
    with suppress(Exception):  # nothing may hide the error that is being explained
        config = read_config(str(folder))
        checkpoint = find_checkpoint(folder, config)
        found = checkpoint.shapes if checkpoint else tensor_shapes(sorted(folder.glob("*.safetensors")))
        made = {name: list(one.shape) for name, one in build_empty(config).state_dict().items()}
        other = next((name for name in sorted(found) if made.get(name, found[name]) != found[name]), None)
        if other is not None:
            return (
                f"its weights have other shapes than its config.json says: {other} is {found[other]}, and should be "
                f"{made[other]}; take the config.json that belongs to these weights"
            )
    return "its weights have other shapes than its config.json says"
