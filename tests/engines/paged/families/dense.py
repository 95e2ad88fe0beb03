"""Configs of dense families, as the config.json of a well-known model has them, with small sizes.

What attention, positions and logits are asked for is that of the model: scales, caps, windows, kinds of layers, kinds
of rotary positions, and the size of a head where it is not a power of two or a scale hangs on it. Layers, hidden
sizes, the vocabulary and the number of heads are small.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]  # as in config.json, with its model_type

TOKENS: Config = {"vocab_size": 260, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HIDDEN: Config = TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL: Config = HIDDEN | {"intermediate_size": 64, "num_key_value_heads": 2}


def _llama3(factor: float) -> Config:
    """The rotary positions of Llama 3.1, stretched by this factor."""
    original = 8192
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def yarn(factor: float, original: int, **others: Any) -> Config:
    """Rotary positions by YaRN."""
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return rope | {"beta_fast": 32.0, "beta_slow": 1.0} | others


LONGROPE: Config = {  # for heads of eight numbers
    "type": "longrope",
    "long_factor": [1.5, 4.0, 16.0, 60.0],
    "short_factor": [1.0, 1.0, 1.5, 2.0],
}
_GEMMA: Config = SMALL | {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_GEMMA3 = _GEMMA | {
    "model_type": "gemma3_text",
    "max_position_embeddings": 32768,
    "num_hidden_layers": 6,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}
_FALCON = HIDDEN | {"model_type": "falcon", "alibi": False, "bias": False, "multi_query": True, "parallel_attn": True}
FALCON_RW = _FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
_OPT = HIDDEN | {"model_type": "opt", "ffn_dim": 64, "activation_function": "relu", "max_position_embeddings": 2048}
_MPT: Config = TOKENS | {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 2048}
_GPT2: Config = TOKENS | {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 1024, "n_ctx": 1024}
_STABLELM = SMALL | {"model_type": "stablelm", "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5}
_GRANITE = SMALL | {
    "model_type": "granite",
    "embedding_multiplier": 12.0,
    "max_position_embeddings": 131072,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000000.0,
}
_QWEN = SMALL | {"hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6}

DENSE: dict[str, Config] = {
    "Gemma 1 2B": _GEMMA | {"model_type": "gemma"},
    "Gemma 2 9B": _GEMMA
    | {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    "Gemma 3 1B": _GEMMA3,
    "Gemma 3 12B": _GEMMA3
    | {
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 1024,
    },
    "Gemma 3 27B": _GEMMA3
    | {
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 1024,
    },
    "Phi-3-mini-4k": SMALL
    | {
        "model_type": "phi3",
        "hidden_size": 192,
        "num_attention_heads": 2,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
    },
    "Phi-4": SMALL
    | {"model_type": "phi3", "max_position_embeddings": 16384, "rope_theta": 250000, "sliding_window": None},
    "Phi-3-mini-128k": SMALL
    | {"model_type": "phi3", "max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    | {"rope_scaling": LONGROPE, "sliding_window": 262144},
    "Phi-4-mini": SMALL
    | {
        "model_type": "phi3",
        "hidden_size": 64,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": LONGROPE | {"long_factor": [1.0, 1.5, 4.0, 16.0, 30.0, 60.0], "short_factor": [1.0] * 6},
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
    "Phi-2": SMALL
    | {
        "model_type": "phi",
        "hidden_size": 160,
        "num_attention_heads": 2,
        "hidden_act": "gelu_new",
        "partial_rotary_factor": 0.4,
    },
    "OLMo 1.7 7B": SMALL | {"model_type": "olmo", "clip_qkv": 8.0, "max_position_embeddings": 4096},
    "OLMo 2 7B": SMALL | {"model_type": "olmo2", "rope_theta": 500000, "rms_norm_eps": 1e-6},
    "OLMo 3 7B": SMALL
    | {
        "model_type": "olmo3",
        "max_position_embeddings": 65536,
        "num_hidden_layers": 4,
        "rope_scaling": yarn(8.0, 8192, attention_factor=1.2079441541679836),
        "rope_theta": 500000,
        "sliding_window": 4096,
    },
    "Granite 3.1 2B": _GRANITE
    | {"attention_multiplier": 0.015625, "logits_scaling": 8.0, "hidden_size": 64, "num_attention_heads": 1}
    | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "Granite 3.1 8B": _GRANITE
    | {"attention_multiplier": 0.0078125, "logits_scaling": 16.0, "hidden_size": 256, "num_attention_heads": 2},
    "SmolLM3 3B": SMALL
    | {
        "model_type": "smollm3",
        "max_position_embeddings": 65536,
        "no_rope_layer_interval": 4,
        "num_hidden_layers": 4,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "GLM-4 9B chat": SMALL
    | {"model_type": "glm", "attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5}
    | {"max_position_embeddings": 131072},
    "GLM-4 9B 0414": SMALL
    | {"model_type": "glm4", "attention_bias": False, "head_dim": 128, "partial_rotary_factor": 0.5}
    | {"max_position_embeddings": 32768},
    "Command R": SMALL
    | {"model_type": "cohere", "logit_scale": 0.0625, "max_position_embeddings": 131072, "rope_theta": 8000000.0}
    | {"num_key_value_heads": 4, "use_qk_norm": False},
    "Command R+": SMALL
    | {"model_type": "cohere", "logit_scale": 0.8333333333333334, "max_position_embeddings": 131072}
    | {"rope_theta": 75000000.0, "use_qk_norm": True},
    "Command R7B": SMALL
    | {
        "model_type": "cohere2",
        "head_dim": 128,
        "logit_scale": 0.25,
        "max_position_embeddings": 132096,
        "num_hidden_layers": 4,
        "rope_theta": 50000,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    "Minitron 4B": SMALL
    | {"model_type": "nemotron", "head_dim": 128, "hidden_act": "relu2", "partial_rotary_factor": 0.5}
    | {"max_position_embeddings": 4096, "norm_eps": 1e-5},
    "StableLM 3B": _STABLELM | {"use_qkv_bias": False, "num_key_value_heads": 4},
    "StableLM 2 1.6B": _STABLELM | {"use_qkv_bias": True, "num_key_value_heads": 4},
    "StableLM 2 12B": _STABLELM | {"use_parallel_residual": True, "qk_layernorm": True},
    "StarCoder2 3B": SMALL
    | {
        "model_type": "starcoder2",
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 16384,
        "norm_epsilon": 1e-5,
        "rope_theta": 999999.4420358813,
        "sliding_window": 4096,
        "use_bias": True,
    },
    "Pythia 1B": HIDDEN
    | {
        "model_type": "gpt_neox",
        "intermediate_size": 64,
        "max_position_embeddings": 2048,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
    },
    "OPT 125M": _OPT | {"do_layer_norm_before": True, "word_embed_proj_dim": 32},
    "OPT 350M": _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "Falcon 7B": _FALCON | {"hidden_size": 56, "num_attention_heads": 7},
    "Falcon 40B": _FALCON | {"new_decoder_architecture": True, "num_attention_heads": 8, "num_kv_heads": 2},
    "Falcon 11B": _FALCON
    | {"new_decoder_architecture": True, "num_attention_heads": 8, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    # Of four heads; the real one has 32, and is among those that are refused.
    "Falcon RW": FALCON_RW,
    "MPT 7B": _MPT | {"attn_config": {"alibi": True, "alibi_bias_max": 8, "clip_qkv": None, "softmax_scale": None}},
    "MPT 7B storywriter": _MPT
    | {"d_model": 48, "n_heads": 6, "attn_config": {"alibi": True, "alibi_bias_max": 16, "clip_qkv": 6.0}},
    "GPT-2": _GPT2 | {"model_type": "gpt2"},
    "StarCoder 1": _GPT2
    | {"model_type": "gpt_bigcode", "multi_query": True, "activation_function": "gelu_pytorch_tanh"},
    "BLOOM 560M": TOKENS | {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
    # Seven heads, since those of BLOOM 176B are no power of two.
    "BLOOM 176B": TOKENS | {"model_type": "bloom", "hidden_size": 56, "n_layer": 2, "n_head": 7},
    "Llama 3.1 8B": SMALL
    | {
        "model_type": "llama",
        "max_position_embeddings": 131072,
        "rope_scaling": _llama3(8.0),
        "rope_theta": 500000.0,
    },
    "Mistral 7B v0.1": SMALL | {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096},
    "Qwen2 7B": _QWEN
    | {"model_type": "qwen2", "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False},
    "Qwen3 8B": _QWEN | {"model_type": "qwen3", "head_dim": 128, "max_window_layers": 36, "use_sliding_window": False},
    "Ministral 8B": SMALL
    | {
        "model_type": "ministral",
        "head_dim": 128,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"],
        "max_position_embeddings": 131072,
        "num_hidden_layers": 4,
        "rope_theta": 100000000.0,
        "sliding_window": 4096,
    },
    "Ministral 3 8B": SMALL
    | {
        "model_type": "ministral3",
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rope_parameters": yarn(16.0, 16384, llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0, rope_theta=1e6),
    },
    "EXAONE 4 32B": SMALL
    | {
        "model_type": "exaone4",
        "max_position_embeddings": 131072,
        "num_hidden_layers": 4,
        "rope_scaling": _llama3(16.0),
        "rope_theta": 1000000,
        "sliding_window": 4096,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "sliding_window_pattern": "LLLG",
    },
    "EXAONE 4 1.2B": SMALL
    | {
        "model_type": "exaone4",
        "layer_types": ["full_attention"] * 2,
        "max_position_embeddings": 65536,
        "rope_scaling": _llama3(16.0),
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    "Hunyuan 7B": SMALL
    | {
        "model_type": "hunyuan_v1_dense",
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0}
        | {"mscale": 1.0, "mscale_all_dim": 1.0},
        "use_qk_norm": True,
    },
    "Apertus 8B": SMALL
    | {
        "model_type": "apertus",
        "hidden_act": "xielu",
        "max_position_embeddings": 65536,
        "rope_scaling": _llama3(8.0),
        "rope_theta": 12000000,
    },
    "Arcee AFM 4.5B": SMALL
    | {
        "model_type": "arcee",
        "head_dim": 128,
        "hidden_act": "relu2",
        "max_position_embeddings": 65536,
        "rope_scaling": yarn(20.0, 4096, mscale=1.0),
        "rope_theta": 10000.0,
    },
    "Helium 1 2B": SMALL | {"model_type": "helium", "head_dim": 8, "rms_norm_eps": 1e-8, "rope_theta": 20000.0},
    "Seed-OSS 36B": SMALL
    | {
        "model_type": "seed_oss",
        "attention_bias": True,
        "attention_dropout": 0.1,
        "attention_out_bias": False,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "rope_theta": 10000000.0,
    },
    "ERNIE 4.5 0.3B": SMALL
    | {"model_type": "ernie4_5", "head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 500000.0},
}
