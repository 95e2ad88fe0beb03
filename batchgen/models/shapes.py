"""Models of a known shape and no known weights, to measure what a size costs without downloading it.

The folder that `make` writes is a model's like any other, so that every engine loads it: but its weight files are
hollow, headers in front of bytes that no disk holds. Whoever loads it fills in random numbers (`random_weights.fill`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from batchgen.models import random_weights
from batchgen.models.definition.errors import ModelError
from batchgen.models.folder import explained
from batchgen.models.search import find_folder

_FILE_BYTES = 5 << 30  # of weights a file, as the hub's are
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

_LLAMA = {
    "model_type": "llama",
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}

# What of a model's config.json decides its size, from the hub: bigscience/bloom-560m, bloom-7b1 and bloom,
# meta-llama/Llama-3.1-8B and -70B, Qwen/Qwen3-0.6B and -30B-A3B, mistralai/Mixtral-8x7B-v0.1, openai/gpt-oss-20b (its
# experts widened from MXFP4), deepseek-ai/DeepSeek-V2-Lite, and the text model of google/gemma-3-12b-pt.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "bloom-560m": {"model_type": "bloom", "n_layer": 24, "hidden_size": 1024, "n_head": 16, "vocab_size": 250_880},
    "bloom-7b1": {"model_type": "bloom", "n_layer": 30, "hidden_size": 4096, "n_head": 32, "vocab_size": 250_880},
    "bloom-176b": {"model_type": "bloom", "n_layer": 70, "hidden_size": 14_336, "n_head": 112, "vocab_size": 250_880},
    "llama-8b": {
        **_LLAMA,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-70b": {
        **_LLAMA,
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "rope_theta": 1_000_000.0,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": False,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "vocab_size": 32_000,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 24,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "vocab_size": 201_088,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": False,
    },
    "gemma3-12b": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 48,
        "hidden_size": 3840,
        "intermediate_size": 15_360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "num_hidden_layers": 27,
        "hidden_size": 2048,
        "intermediate_size": 10_944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_theta": 10_000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
        "vocab_size": 102_400,
        "max_position_embeddings": 163_840,
        "tie_word_embeddings": False,
    },
}


def config_of(shape: str) -> Any:
    """The Transformers config of a shape: a name of `SHAPES`, or a config.json, or a folder that holds one.

    Raises:
        ModelError: there is no such shape, or Transformers does not know it.
    """
    from transformers import AutoConfig

    from batchgen.models.definition.model_config import read_config, read_config_file

    if shape in SHAPES:
        values = dict(SHAPES[shape])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    with explained(shape):
        path = Path(shape)
        if path.is_dir():
            return read_config(shape)
        if not path.is_file():
            raise ModelError(f"there is no shape {shape}: name a config.json, or one of {', '.join(SHAPES)}")
        return read_config_file(path)


def find(name: str) -> tuple[Any, Path | None]:
    """The config of a model on this machine or of a shape, and the folder of its tokenizer; None: it has none.

    Raises:
        ModelError: as `config_of`, or `models.resolve`.
    """
    if name in SHAPES:
        return config_of(name), None
    with explained(name):
        if Path(name).is_file():
            return config_of(name), None
        folder = find_folder(name)
        names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json")
        has_tokenizer = any((folder / one).exists() for one in names)
        return config_of(str(folder)), folder if has_tokenizer else None


def make(shape: str, dtype: torch.dtype, folder: Path) -> Path:
    """Writes a hollow model of that shape into the new folder `folder`, and gives it.

    It has no end of sequence, so that every row generates as much as it is asked for. Its tokenizer makes a token of a
    word; the words are noise.

    Raises:
        ModelError: as `config_of`; or the file system has no sparse files of that size.
    """
    config = config_of(shape)
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    config.dtype = dtype
    tensors = _tensors(config, dtype)
    folder.mkdir(parents=True)
    try:
        config.save_pretrained(folder)
        _write_tokenizer(folder, config.get_text_config().vocab_size)
        index = _write_weights(folder, tensors)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        spread = getattr(config.get_text_config(), "initializer_range", 0.02)
        known = {"shape": shape, "standard_deviation": spread}
        (folder / random_weights.HOLLOW).write_text(json.dumps(known), encoding="utf-8")
    except OSError as error:
        raise ModelError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def _tensors(config: Any, dtype: torch.dtype) -> dict[str, tuple[str, list[int], int]]:
    """Type, shape and bytes of each tensor that a file of this model holds; a tied one is there once."""
    from batchgen.models.definition.build import build_empty

    model = build_empty(config, dtype)
    kept = model.state_dict()
    named = {**dict(model.named_parameters()), **{name: one for name, one in model.named_buffers() if name in kept}}
    return {name: (_NAMES[one.dtype], list(one.shape), one.numel() * one.element_size()) for name, one in named.items()}


def _write_weights(folder: Path, tensors: Mapping[str, tuple[str, list[int], int]]) -> dict[str, Any]:
    """Hollow safetensors files; their index."""
    files: list[dict[str, Any]] = []
    size = _FILE_BYTES
    for name, (dtype, shape, length) in tensors.items():
        if not files or size + length > _FILE_BYTES:
            files.append({"__metadata__": {"format": "pt"}})
            size = 0
        files[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [size, size + length]}
        size += length
    where: dict[str, str] = {}
    for number, header in enumerate(files, 1):
        path = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        described = json.dumps(header).encode()
        described += b" " * (-len(described) % 8)
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        with path.open("wb") as file:
            file.write(len(described).to_bytes(8, "little") + described)
            os.truncate(file.fileno(), 8 + len(described) + end)
        where |= {name: path.name for name in header if name != "__metadata__"}
    total = sum(length for *_, length in tensors.values())
    return {"metadata": {"total_size": total}, "weight_map": where}


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=words, pad_token="w3").save_pretrained(folder)
