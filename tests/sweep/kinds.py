"""Every kind of model that Transformers continues a text with, as small as it can be built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.sweep.sizes import END, HEADS, MOST_PARAMETERS, OWN, SIZES, UNTIED

CAUSAL = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SEEING = tuple(kind for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if kind not in CAUSAL)
ALL = (*CAUSAL, *SEEING)


def make_config(kind: str) -> Any:
    """The config of a tiny model of that `model_type`."""
    config = AutoConfig.for_model(kind, **_sizes(CONFIG_MAPPING[kind], OWN.get(kind, {})))
    if kind in UNTIED:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


def _sizes(config: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """What a config of this class is told: the sizes that it has a name for, those of its parts, and its `own`."""
    sizes = {field.name: SIZES[field.name] for field in dataclasses.fields(config) if field.name in SIZES}
    if "kv_lora_rank" in sizes:  # latent attention has as many keys as queries
        sizes["num_key_value_heads"] = HEADS
    parts = _parts(config)
    for name, (part, model_type) in parts.items():
        mine = own.get(name, {})
        kind = mine.get("model_type") or model_type or getattr(part, "model_type", None)
        found = CONFIG_MAPPING[kind] if part is AutoConfig else part
        sizes[name] = {"model_type": kind, **_sizes(found, mine)}
    return sizes | {name: value for name, value in own.items() if name not in parts}


def _parts(config: Any) -> dict[str, tuple[Any, str | None]]:
    """The class of each part that a config of this class has, and the `model_type` that it is unless it is told."""
    if hasattr(config, "sub_configs_defaults"):
        return {name: (part.config_class, part.model_type) for name, part in config.sub_configs_defaults.items()}
    if AutoConfig not in config.sub_configs.values():
        return {name: (part, None) for name, part in config.sub_configs.items()}
    usual = config()  # in Transformers 5.17 only a whole config knows which parts it takes
    return {
        name: (part, getattr(getattr(usual, name), "model_type", None)) for name, part in config.sub_configs.items()
    }


def model_class(config: Any) -> Any:
    """The class that the files of such a model are written by: with what it sees with, if it sees."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def build(kind: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model in float32, in eval mode. Many of its rows end by themselves.

    Raises:
        ValueError: it is not tiny.
        Exception: Transformers cannot make it, of these sizes or for want of a package.
    """
    config = make_config(kind)
    make = model_class(config)
    with torch.device("meta"):
        count = sum(one.numel() for one in make(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"the smallest that could be made has {count:,} parameters")
    torch.manual_seed(seed)
    model: PreTrainedModel = make(config).float().eval()
    head = model.get_output_embeddings()
    if head is not None:
        with torch.no_grad():
            head.weight[END] *= 1.6
    return model
