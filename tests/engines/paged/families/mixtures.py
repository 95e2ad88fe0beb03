"""Configs of mixtures of experts, as in `dense`; and of models that `paged` must refuse."""

from __future__ import annotations

from tests.engines.paged.families.dense import FALCON_RW, LONGROPE, SMALL, Config, yarn

_PHI_MOE = SMALL | {
    "model_type": "phimoe",
    "attention_bias": True,
    "input_jitter_noise": 0.01,
    "lm_head_bias": True,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 2,
    "num_local_experts": 16,
    "rope_theta": 10000.0,
    "router_jitter_noise": 0.01,
    "sliding_window": 131072,
}
MIXTURES: dict[str, Config] = {
    "Mixtral 8x7B": SMALL
    | {
        "model_type": "mixtral",
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "Qwen1.5-MoE A2.7B": SMALL
    | {
        "model_type": "qwen2_moe",
        "decoder_sparse_step": 1,
        "max_window_layers": 21,
        "moe_intermediate_size": 32,
        "norm_topk_prob": False,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 4,
        "rope_theta": 1000000.0,
        "shared_expert_intermediate_size": 128,
        "sliding_window": 32768,
        "use_sliding_window": False,
    },
    "Qwen3 30B A3B": SMALL
    | {
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "OLMoE 1B 7B": SMALL
    | {"model_type": "olmoe", "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False, "clip_qkv": None}
    | {"num_key_value_heads": 4},
    "Granite 3.1 1B A400M": SMALL
    | {
        "model_type": "granitemoe",
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "hidden_size": 64,
        "logits_scaling": 6.0,
        "num_attention_heads": 1,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 1,
        "num_local_experts": 32,
        "residual_multiplier": 0.22,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    # The window is as long as the context, which is 131,072 tokens in the real config. Transformers' own mask of a
    # prefill has a number for each pair of positions in a window: 17 GB of them.
    "Phi-3.5-MoE": _PHI_MOE
    | {"sliding_window": 8192, "max_position_embeddings": 8192}
    | {
        "rope_scaling": LONGROPE
        | {"original_max_position_embeddings": 4096}
        | {"short_mscale": 1.243163121016122, "long_mscale": 1.243163121016122}
    },
    "gpt-oss 20B": SMALL
    | {
        "model_type": "gpt_oss",
        "attention_bias": True,
        "head_dim": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "num_local_experts": 32,
        "rms_norm_eps": 1e-5,
        "rope_scaling": yarn(32.0, 4096, truncate=False),
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
    },
    "GLM-4.5 Air": SMALL
    | {
        "model_type": "glm4_moe",
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "partial_rotary_factor": 0.5,
        "rope_theta": 1000000,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": False,
    },
    "GLM-4.5": SMALL
    | {
        "model_type": "glm4_moe",
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "moe_intermediate_size": 32,
        "n_routed_experts": 160,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "partial_rotary_factor": 0.5,
        "rope_theta": 1000000,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
    },
    "ERNIE 4.5 21B A3B": SMALL
    | {
        "model_type": "ernie4_5_moe",
        "moe_intermediate_size": 32,
        "moe_k": 6,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_norm_min": 1e-12,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    "DeepSeek-V2-Lite": SMALL
    | {
        "model_type": "deepseek_v2",
        "first_k_dense_replace": 1,
        "kv_lora_rank": 64,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 32,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 2,
        "num_experts_per_tok": 6,
        "num_key_value_heads": 2,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rope_scaling": yarn(40.0, 4096, mscale=0.707, mscale_all_dim=0.707),
        "rope_theta": 10000.0,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "n_group": 1,
        "topk_method": "greedy",
        "v_head_dim": 128,
    },
}

REFUSED: dict[str, tuple[Config, str]] = {
    # Transformers rounds its biases of positions to bfloat16, which shows where slopes are no powers of two.
    "Falcon RW 1B": (
        FALCON_RW | {"hidden_size": 128, "num_attention_heads": 32},
        "the logits of a small model of its config differ",
    ),
    # The window stands in Transformers' mask alone, and attention is told of none.
    "Phi-mini-MoE": (
        _PHI_MOE | {"max_position_embeddings": 4096, "sliding_window": 2047},
        "the logits of a small model of its config differ",
    ),
    "Qwen2-MoE with its window": (
        MIXTURES["Qwen1.5-MoE A2.7B"]
        | {"use_sliding_window": True, "max_position_embeddings": 131072, "max_window_layers": 1},
        "the logits of a small model of its config differ",
    ),
}
"""Configs, and a part of the sentence that refuses each."""
