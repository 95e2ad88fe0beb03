"""Sizes of a model's parameters, from its config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    T5Config,
)

from batchgen.engine import EngineError
from batchgen.models.parameters import Parameters, list_parameters
from tests.sweep.kinds import make_config

MIB = 1 << 20
BLOOM = BloomConfig(vocab_size=250_880, hidden_size=14_336, n_layer=70, n_head=112)


def test_blooms_largest_parameter_is_its_embedding_and_no_memory_is_needed_to_know_it() -> None:
    found = list_parameters(BLOOM, torch.bfloat16)
    assert found.largest == 250_880 * 14_336
    assert found.read_bytes == 352_494_542_848  # 176,247,271,424 parameters
    assert found.shards(8)[0] == 250_880 * 14_336 // 8


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bloom"])
def test_sizes_are_those_of_the_loaded_model(model: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    real = AutoModelForCausalLM.from_pretrained(folder)
    found = list_parameters(AutoConfig.from_pretrained(folder), torch.float32)
    assert {name: parameter.numel for name, parameter in found.by_name.items()} == {
        name: value.numel() for name, value in real.named_parameters(remove_duplicate=False)
    }
    assert found.read_bytes == sum(value.numel() * 4 for value in real.parameters())


def test_a_tied_head_is_sharded_before_it_is_tied_and_read_once(tiny_bloom: Path) -> None:
    found = list_parameters(AutoConfig.from_pretrained(tiny_bloom), torch.float32)
    assert found.by_name["lm_head.weight"].tied
    assert found.shard_bytes(1) == found.read_bytes + 4 * found.by_name["lm_head.weight"].numel


def test_shards_are_padded_so_that_all_ranks_have_as_much() -> None:
    found = list_parameters(LlamaConfig(vocab_size=10, hidden_size=6, intermediate_size=7, num_hidden_layers=1,
                                   num_attention_heads=2), torch.float32)  # fmt: skip
    assert found.by_name["model.layers.0.mlp.up_proj.weight"].numel == 42
    assert 11 in found.shards(4)  # 42 / 4, rounded up
    assert found.shard_bytes(4) == 4 * sum(-(-p.numel // 4) for p in found.by_name.values())


# What of a tiny model of a kind is experts, and the part of it that a token is sent to.
@pytest.mark.parametrize(
    ("kind", "experts", "share"),
    [
        ("mixtral", 4 * 4 * 3 * 32 * 64, 0.5),  # layers, experts, matrices, sizes
        ("qwen2_moe", 4 * 4 * 3 * 32 * 32, 0.5),  # a shared expert is always active
        ("deepseek_v3", 3 * 4 * 3 * 32 * 32, 0.5),  # and the first layer dense
        ("gpt_oss", 4 * 4 * (3 * 32 * 64 + 2 * 64 + 32), 0.5),  # biases of the experts, too
        ("nemotron_h", 4 * 2 * 32 * 32, 0.5),  # no gate
        ("llama4_text", 4 * 4 * 3 * 32 * 64, 0.5),
        ("ernie4_5_moe", 3 * 4 * 3 * 32 * 32, 0.5),
        ("hunyuan_v1_moe", 4 * 4 * 3 * 32 * 64, 0.25),
        ("llama", 0, 0.5),
    ],
)
def test_experts_count_as_active_where_a_token_is_sent_to_them(kind: str, experts: int, share: float) -> None:
    found = list_parameters(make_config(kind), torch.float32)
    assert found.experts == experts
    assert found.active_experts == experts * share
    assert found.total - found.active == experts * (1 - share)


def test_a_step_reads_the_experts_that_any_of_its_tokens_is_sent_to() -> None:
    found = list_parameters(make_config("mixtral"), torch.float32)
    always = found.total - found.experts
    assert found.step_bytes(1) == found.active * 4
    generator = torch.Generator().manual_seed(0)
    for tokens in (2, 3, 5):
        chosen = torch.rand((10_000, tokens, 4), generator=generator).argsort(-1)[..., :2]  # 2 of 4 experts a token
        hit = (chosen.flatten(1)[..., None] == torch.arange(4)).any(1).float().mean().item()
        assert found.step_bytes(tokens) == pytest.approx((always + hit * found.experts) * 4, rel=0.01)
    assert found.step_bytes(1000) == pytest.approx(found.read_bytes)
    dense = list_parameters(make_config("llama"), torch.float32)
    assert dense.step_bytes(1) == dense.read_bytes


def test_experts_that_the_model_keeps_in_one_tensor_count_as_one() -> None:
    config = MixtralConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)  # fmt: skip
    found = list_parameters(config, torch.float32)
    assert found.largest == 4 * 2 * 32 * 16  # gate and up of four experts; a file may hold eight matrices
    assert found.max_at_once(1, 4 * 600) == 2  # that one, and down: 4 x 32 x 16 elements


def llama(**settings: Any) -> Parameters:
    config = LlamaConfig(vocab_size=1000, hidden_size=2048, intermediate_size=4096, num_hidden_layers=2,
                         num_attention_heads=8, **settings)  # fmt: skip
    return list_parameters(config, torch.float32)


def test_as_many_parameters_are_needed_at_once_as_a_module_and_those_around_it_have() -> None:
    assert llama().max_at_once(1, MIB) == 1  # a matrix; norms are too small to count
    # The embedding may be kept until the head needs it.
    assert llama(tie_word_embeddings=True).max_at_once(1, MIB) == 2


def test_a_whole_layer_is_needed_at_once() -> None:
    assert llama().max_at_once(1, MIB, whole_layers=True) == 7
    assert llama(tie_word_embeddings=True).max_at_once(1, MIB, whole_layers=True) == 8
    bloom = list_parameters(BLOOM, torch.bfloat16)
    assert bloom.max_at_once(8, MIB, whole_layers=True) == 5  # four matrices and the tied embedding


def test_what_each_rank_has_too_little_of_does_not_count() -> None:
    # Of 16 MiB for a square of 2048, 4 heads of 8 leave 4 MiB for each of keys and values.
    grouped = llama(num_key_value_heads=2)
    counts = [grouped.max_at_once(ranks, MIB, whole_layers=True) for ranks in (1, 4, 5, 16, 17, 32, 33)]
    assert counts == [7, 7, 5, 5, 3, 3, 0]


def test_a_matrix_counts_however_much_larger_the_embedding_is() -> None:
    # Keys and values of Gemma 3 1B are a thousandth of its embedding, and swapped in float32.
    config = Gemma3TextConfig(vocab_size=262_144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=1, head_dim=256)  # fmt: skip
    assert list_parameters(config, torch.float32).max_at_once(1, MIB, whole_layers=True) == 7 + 1
    assert list_parameters(config, torch.bfloat16).max_at_once(1, MIB, whole_layers=True) == 5 + 1


def test_a_model_that_continues_no_text_is_refused() -> None:
    with pytest.raises(EngineError, match="no language model of type t5"):
        list_parameters(T5Config(), torch.float32)
