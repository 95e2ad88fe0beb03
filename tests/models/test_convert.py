"""The default model's packaged file, read as Transformers' own loader reads it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from batchgen.models.convert import convert

WIDTH, HEADS, KV_HEADS, LAYERS, INNER = 64, 4, 2, 2, 96


def packed_model(file: Path, architecture: str = "llama") -> Path:
    """A tiny random Llama with a byte-level vocabulary, its weights in 8 bits as the real one's embedding is."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    letters = [chr(number) for number in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ĠĠ", "he", "hel"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ", "h e", "he l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, shape in shapes(len(tokens)).items():
        values = np.random.default_rng(len(name)).normal(0, 0.3, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    kv_width = WIDTH // HEADS * KV_HEADS
    layer = {
        "attn_norm": (WIDTH,),
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (kv_width, WIDTH),
        "attn_v": (kv_width, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_norm": (WIDTH,),
        "ffn_gate": (INNER, WIDTH),
        "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER),
    }
    layers = {f"blk.{number}.{name}": shape for number in range(LAYERS) for name, shape in layer.items()}
    return {"token_embd": (vocabulary, WIDTH), "output_norm": (WIDTH,), **layers}


def test_weights_and_settings_equal_those_of_transformers_own_loader(tmp_path: Path) -> None:
    packed = packed_model(tmp_path / "tiny.gguf")
    convert(packed, tmp_path / "ours")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=packed.name, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, values in ours.state_dict().items():
        assert torch.equal(values, expected[name]), name
    for setting in (
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "max_position_embeddings",
        "eos_token_id",
    ):
        assert getattr(ours.config, setting) == pytest.approx(getattr(theirs.config, setting)), setting


def test_tokens_equal_those_of_transformers_own_loader_except_before_digits(tmp_path: Path) -> None:
    packed = packed_model(tmp_path / "tiny.gguf")
    convert(packed, tmp_path / "ours")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=packed.name)
    for text in ("hello  help", "<|im_start|>he<|im_end|>\n", "x1 23", "  a"):
        assert ours(text).input_ids == theirs(text).input_ids, text
    assert ours.convert_ids_to_tokens(ours("he  1").input_ids) == ["he", "ĠĠ", "1"]
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (ours.unk_token, ours.model_max_length) == ("<|endoftext|>", 128)
    chat = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "hello"


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    packed = packed_model(tmp_path / "tiny.gguf", architecture="mistral")
    with pytest.raises(ValueError, match=r"tiny\.gguf holds a model of the kind \('mistral'"):
        convert(packed, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
