"""Tiny random models for tests, built on the spot: a byte-level tokenizer and two layers.

`initializer_range` is large because a tiny model with the usual one repeats a single token, and then any two ways of
generating agree.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message['role'] + ' is not known') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SPECIAL = ("<pad>", "<s>", "</s>", "<|end|>")
PAD, BEGIN, END, END_OF_TURN = range(4)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, after four special ones. Plain texts get a beginning-of-sequence token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = chat_template
    return fast


def sentencepiece_like_tokenizer() -> PreTrainedTokenizerFast:
    """Words with a leading "▁", whose decoder drops the first space, as Llama 2's does; `<s>` and `</s>` around it."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁a", "▁good", "▁day", "a", "!"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama(vocabulary: int, **settings: Any) -> PreTrainedModel:
    """Two layers, four heads of which two are cached."""
    config = LlamaConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
            "bos_token_id": BEGIN,
            "eos_token_id": END,
            "pad_token_id": PAD,
        }
        | settings
    )
    return LlamaForCausalLM(config)


def bloom(vocabulary: int, **settings: Any) -> PreTrainedModel:
    """Two layers with ALiBi. Its embeddings are tied, so it takes larger weights to keep it from repeating itself."""
    config = BloomConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 1.0,
            "bos_token_id": BEGIN,
            "eos_token_id": END,
            "pad_token_id": PAD,
        }
        | settings
    )
    return BloomForCausalLM(config)


def save(
    folder: Path, build: Callable[..., PreTrainedModel], *, seed: int = 0, chat: bool = True, **settings: Any
) -> Path:
    """A model folder as the hub has them: config, safetensors, tokenizer, generation config."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(CHAT_TEMPLATE if chat else None)
    build(len(tokenizer), **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
