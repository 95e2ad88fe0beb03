"""LoRA adapters for tests: drawn at random for tiny models and saved by peft, and the models that peft merges."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from tests import tiny_models

Settings = Mapping[str, Any]

# For each base model, settings of peft's LoraConfig by a name.
CASES: dict[str, dict[str, Settings]] = {
    "llama": {
        "two kinds of layers": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 12},
        "rank-stabilised, of several ranks and alphas": {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 8, "layers.0.mlp.up_proj": 2, "^model.layers.1.self_attn.v_proj": 3},
            "alpha_pattern": {"o_proj": 32, r"layers\.\d.mlp.down_proj": 3},
        },
        "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        "whole ends": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        "ends as products": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    },
    "bloom": {
        "fused, every bias": {"target_modules": ["query_key_value", "dense"], "bias": "all"},
        "fused, biases of its layers": {"target_modules": "all-linear", "bias": "lora_only"},
        "products with a bias": {"target_modules": ["query_key_value", "dense_4h_to_h"], "lora_bias": True},
    },
    "gpt2": {
        "turned weights": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        "turned weights, DoRA": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    },
    "mixtral": {
        "experts and router": {"target_modules": "all-linear"},
        "attention alone": {"target_modules": ["q_proj", "o_proj"]},
        "one parameter of the experts": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    },
    "phi3": {
        "fused projections": {"target_modules": "all-linear"},
    },
}


def gpt2(vocabulary: int, **settings: Any) -> PreTrainedModel:
    """Two layers whose weights are kept as [columns, rows]."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3}
    ends = {"bos_token_id": tiny_models.BEGIN, "eos_token_id": tiny_models.END, "pad_token_id": tiny_models.PAD}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes, **ends, **settings))


def mixtral(vocabulary: int, **settings: Any) -> PreTrainedModel:
    """Two layers with four experts each."""
    return MixtralForCausalLM(
        MixtralConfig(**tiny_models.SMALL | {"vocab_size": vocabulary, "num_local_experts": 4} | settings)
    )


def phi3(vocabulary: int, **settings: Any) -> PreTrainedModel:
    """Two layers whose projections of one input are one layer."""
    return Phi3ForCausalLM(Phi3Config(**tiny_models.SMALL | {"vocab_size": vocabulary} | settings))


BUILDERS = {"llama": tiny_models.llama, "bloom": tiny_models.bloom, "gpt2": gpt2, "mixtral": mixtral, "phi3": phi3}


def save_base(folder: Path, name: str, **settings: Any) -> Path:
    """A base model of `CASES` in the new folder `folder`."""
    return tiny_models.save(folder, BUILDERS[name], chat=False, **settings)


def save_adapter(base: Path, folder: Path, settings: Settings, *, merged: Path | None = None) -> Path:
    """An adapter of `base` with random numbers everywhere, in the new folder `folder`.

    Args:
        merged: the new folder of the model into which peft has merged it; None: it need not.
    """
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of what is asked for here: tied weights, saved embeddings
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad or "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        adapted.save_pretrained(folder)
        if merged is not None:
            adapted.merge_and_unload().save_pretrained(merged)
            for path in base.glob("token*"):
                shutil.copy(path, merged)
    return folder
