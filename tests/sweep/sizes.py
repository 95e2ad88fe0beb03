"""How small each kind of model is built: one table of names for nearly all kinds, since most configs name their sizes
alike, and what single kinds need besides."""

from __future__ import annotations

from typing import Any

PAD, BEGIN, END, UNKNOWN = range(4)
VOCABULARY = 128
CONTEXT = 256
MOST_PARAMETERS = 8_000_000  # of a model that counts as tiny

_WIDTH, _INNER, _LAYERS, HEADS, _CACHED = 32, 64, 4, 4, 2

# fmt: off
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "text_vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
    "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD,
    "initializer_range": 0.3, "init_std": 0.3, "initializer_factor": 0.3,
    # widths
    "hidden_size": _WIDTH, "n_embd": _WIDTH, "d_model": _WIDTH, "dim": _WIDTH, "embed_dim": _WIDTH, "width": _WIDTH,
    "embedding_size": _WIDTH, "word_embed_proj_dim": _WIDTH, "hidden_dim": _WIDTH, "dim_model": _WIDTH,
    "intermediate_size": _INNER, "ffn_dim": _INNER, "dim_ff": _INNER, "dff": _INNER, "ffn_hidden_size": _INNER,
    "encoder_ffn_dim": _INNER, "decoder_ffn_dim": _INNER, "d_inner": _INNER, "n_inner": _INNER,
    "is_decoder": True,
    # depths
    "num_hidden_layers": _LAYERS, "n_layer": _LAYERS, "n_layers": _LAYERS, "num_layers": _LAYERS, "depth": _LAYERS,
    "encoder_layers": _LAYERS, "decoder_layers": _LAYERS, "num_encoder_layers": _LAYERS, "num_decoder_layers": _LAYERS,
    # heads
    "num_attention_heads": HEADS, "n_head": HEADS, "n_heads": HEADS, "num_heads": HEADS, "head_dim": 8,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "num_key_value_heads": _CACHED,
    "num_encoder_attention_heads": HEADS, "num_decoder_attention_heads": HEADS, "num_kv_heads": _CACHED,
    # latent attention
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16,
    "v_head_dim": 8, "rotary_dim": 8,
    # lengths
    "max_position_embeddings": CONTEXT, "n_positions": CONTEXT, "n_ctx": CONTEXT, "max_seq_len": CONTEXT,
    "sliding_window": 16, "attention_window_size": 16, "attention_chunk_size": 16,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "shared_intermediate_size": 32,
    # states
    "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "ssm_state_size": 8, "lru_width": _WIDTH, "mamba_expand": 2, "mamba_dt_rank": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    # pictures and sound, which the text rows here never use
    "image_size": 32, "patch_size": 8, "out_hidden_size": _WIDTH, "projection_dim": _WIDTH, "num_mel_bins": 8,
}
# fmt: on

# What a single kind needs besides, for itself or, by the name of one of its parts, for that part.
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_PLACES = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}  # of time, height and width
_HALF_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
_HALF_CONV = {"layer_types": ["conv", "full_attention"] * 2}
_GEMMA3N = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
_BY_LAYER = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
}
_DOTS3 = {
    "index_topk": 16,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "shared_experts_intermediate_size": 32,
    "mlp_layer_types": ["dense", "sparse"] * 2,
}
_SEEN = {"out_hidden_size": 32, "deepstack_visual_indexes": [0, 1]}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _HALF_LINEAR | {"n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        **{
            name: {"hidden_size_global": 32}
            for name in ("encoder_config", "decoder_config", "global_config", "patcher_config")
        },
    },
    "cohere_compass": {"vision_config": _SEEN, "text_config": _BY_LAYER},
    "cohere_compass_text": _BY_LAYER,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"vision_config": {"encoder_config": {"layer_types": ["full_attention"] * 4}}},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense"] * 4},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 16},
    },
    "dots3_note_text": _DOTS3,
    "chameleon": {
        "vocabulary_map": {"<image>": 4},
        "vq_config": {
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "embed_dim": 4,
            "num_res_blocks": 1,
            "num_embeddings": 16,
            "latent_channels": 32,
        },
    },
    "camembert": {"initializer_range": 1.0},
    "data2vec-text": {"initializer_range": 1.0},
    "roberta": {"initializer_range": 1.0},
    "roformer": {"initializer_range": 1.0},
    "xlm-roberta": {"initializer_range": 1.0},
    "emu3": {
        "vocabulary_map": {"<image>": 4},
        "vq_config": {
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "embed_dim": 4,
            "num_res_blocks": 1,
            "codebook_size": 16,
            "attn_resolutions": [],
        },
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": _GEMMA3N,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "granitemoehybrid": _HALF_LINEAR,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _HALF_LINEAR
    | {"linear_head_dim": 8, "linear_num_heads": 4, "mlp_layer_types": ["dense", "sparse"] * 2},
    "lfm2": _HALF_CONV,
    "lfm2_moe": _HALF_CONV | {"num_dense_layers": 1},
    "lfm2_vl": {"text_config": _HALF_CONV},
    "lfm3": {"layer_types": ["conv", "sliding_attention", "conv", "full_attention"]},
    "llama4": {
        "vision_config": {
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "pixel_shuffle_ratio": 0.5,
        },
    },
    "longcat_flash": {"ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "nemotron_h": {"n_groups": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "feed_forward_size": 64,
        "attn_layers": ["local", "lsh"] * 2,
        "num_buckets": 4,
    },
    "roc_bert": {
        "shape_vocab_size": 128,
        "pronunciation_vocab_size": 128,
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
        "initializer_range": 1.0,
    },
    "xlm": {"emb_dim": 32, "init_std": 1.0, "embed_init_std": 1.0, "causal": True},
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "cosmos3_edge": {"text_config": _PLACES},
    "glm46v": {"text_config": _PLACES},
    "glm4v": {"text_config": _PLACES},
    "glm_ocr": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}, "head_dim": 16}},
    "glmga": {
        "text_config": {
            "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
            "head_dim": 16,
        }
    },
    "glm4v_moe": {"text_config": {"head_dim": 16, **_PLACES}},
    "paddleocr_vl": {"text_config": _PLACES},
    "qwen2_vl": {"text_config": _PLACES},
    "qwen2_5_vl": {"text_config": _PLACES},
    "qwen2_5_omni_thinker": {
        "text_config": _PLACES,
        "vision_start_token_id": 100,
        "vision_end_token_id": 101,
        "audio_config": {"output_dim": 32},
    },
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 100,
        "audio_config": {"output_dim": 32, "downsample_hidden_size": 16},
    },
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "hunyuan_vl": {"text_config": _PLACES},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [32, 32],
            "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        }
    },
    "gemma4_unified": {"vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32}},
    "glm5_next": {
        "text_config": {
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "index_head_dim": 8,
            "index_n_heads": 2,
            "index_topk": 16,
            "index_kpool": 4,
        }
    },
    "granite4_vision": {"deepstack_layer_map": [], "spatial_target_layers": []},
    "inkling2": {"vision_config": {"text_hidden_size": 32, "projection_hidden_dim": 32}},
    "janus": {
        "vq_config": {
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_embeddings": 16,
            "image_token_embed_dim": 32,
            "projection_dim": 32,
            "latent_channels": 32,
        }
    },
    "molmo2": {
        "vision_config": {"image_size": [32, 32]},
        "adapter_config": {"vision_feature_layer": [1, 2], "text_hidden_size": 32},
    },
    "muse_glimmer": {"projector_hidden_size": 32},
    "muse_spark": {
        "projector_hidden_size": 32,
        "text_config": {"moe_hidden_size": 32},
        "audio_config": {"hidden_sizes": [8, 8, 16, 32]},
    },
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2},
        "projector_hidden_size": 32,
        "vision_hidden_size": 32,
        "text_config": {"n_groups": 2},
    },
}

# Kinds that repeat their last token if embedding and head are one matrix.
UNTIED = frozenset(
    {
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "biogpt",
        "blenderbot-small",
        "camembert",
        "cpmant",
        "ctrl",
        "data2vec-text",
        "electra",
        "ernie",
        "fuyu",
        "gemma2",
        "gemma3_text",
        "gemma4",
        "gemma4_unified",
        "gemma4_unified_text",
        "git",
        "granite_docling",
        "kosmos-2.5",
        "marian",
        "mvp",
        "openai-gpt",
        "opt",
        "pegasus",
        "reformer",
        "rembert",
        "roberta",
        "roc_bert",
        "roformer",
        "trocr",
        "xglm",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
