"""The default model's packaged file, as a folder that Transformers loads.

The file is in GGUF (github.com/ggml-org/ggml, docs/gguf.md): metadata, and weights quantised to 4 bits. It is read with
the `gguf` package and written out here rather than through Transformers' own loader for GGUF: that one needs a minute,
keeps a quantiser on the model whose removal differs between versions, and ignores `tokenizer.ggml.pre`, so that blanks
before digits get other tokens than the model was trained with. What is written depends on no version of any package, so
the folder has the same fingerprint on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from torch import Tensor

# GGUF's names of the tensors of a Llama model, and Transformers'.
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # tokenizer.ggml.token_type of special tokens


def convert(packed: Path, folder: Path) -> None:
    """Writes the model in GGUF file `packed` (Llama, byte-level BPE of the kind "smollm") into the new folder `folder`.

    Weights become bfloat16 safetensors; beside them both configurations, the tokenizer and the chat template.

    Raises:
        ValueError: the file holds another kind of model.
        OSError: the folder cannot be written.
    """
    from gguf import GGUFReader
    from safetensors.torch import save

    reader = GGUFReader(packed)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    kind = tuple(metadata.get(key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise ValueError(f"{packed.name} holds a model of the kind {kind}; only ('llama', 'gpt2', 'smollm') is known")
    texts = {
        "config.json": _json(_config(metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))),
        "generation_config.json": _json(_special_ids(metadata)),
        "tokenizer.json": _json(_tokenizer(metadata)),
        "tokenizer_config.json": _json(_tokenizer_config(metadata)),
        "chat_template.jinja": metadata["tokenizer.chat_template"],
    }
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    # In memory first: safetensors writing a file itself reports a full disk as an error of its own, not as an OSError.
    (folder / "model.safetensors").write_bytes(save(_weights(reader, metadata), metadata={"format": "pt"}))


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {ours: metadata[f"tokenizer.ggml.{name}_token_id"] for ours, name in names.items()}


def _config(metadata: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    width, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        # A float32 in the file: 1e-05 reads as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "use_cache": True,
        **_special_ids(metadata),
    }


def _tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` in the form of the `tokenizers` package.

    "smollm" splits off every digit before the byte-level split (LLAMA_VOCAB_PRE_TYPE_SMOLLM in llama.cpp's
    src/llama-vocab.cpp).
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": tokens[number], **flags}
            for number, kind in enumerate(metadata["tokenizer.ggml.token_type"])
            if kind == _CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        # Not the original's class, GPT2Tokenizer: Transformers 5 builds that one's splitting anew, without digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **{ours: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for ours, name in names.items()},
    }


def _weights(reader: GGUFReader, metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """All weights by Transformers' names, bfloat16."""
    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        stem, _, _ = tensor.name.rpartition(".")
        if not stem.startswith("blk."):
            weights[f"{_OUTSIDE[stem]}.weight"] = _dequantized(tensor, None)
            continue
        _, layer, part = stem.split(".")
        weights[f"model.layers.{layer}.{_INSIDE[part]}.weight"] = _dequantized(tensor, heads.get(part))
    return weights


def _dequantized(tensor: ReaderTensor, heads: int | None) -> Tensor:
    """The values of `tensor`. With `heads`, the rows of each head go back into the order that Transformers rotates.

    GGUF keeps the two values that rotary embedding pairs next to each other, (rows / 2, 2); Transformers keeps them
    half a head apart, (2, rows / 2). (`permute` in llama.cpp's convert_hf_to_gguf.py, the other way round.)
    """
    import torch
    from gguf import dequantize

    values = dequantize(tensor.data, tensor.tensor_type)
    if heads is not None:
        rows, columns = values.shape
        values = values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return torch.from_numpy(values.copy()).to(torch.bfloat16)
