"""DeepSpeed's configuration of ZeRO for a model: sizes from the model, and the user's file over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, LlamaConfig

from batchgen.engine import EngineError
from batchgen.engines.ds_zero import deepspeed_config
from batchgen.models.parameters import list_parameters

BLOOM = BloomConfig(vocab_size=1000, hidden_size=64, n_layer=3, n_head=4)  # tied
LLAMA = LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                    num_attention_heads=4)  # fmt: skip
BLOOM_LAYER = 12 * 64 * 64 + 13 * 64  # four matrices of 3, 1, 4 and 4 squares, their biases, two norms
LLAMA_LAYER = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64


def test_a_layer_is_fetched_ahead_and_a_tied_embedding_stays_until_its_second_use() -> None:
    found = deepspeed_config.make_bucket_sizes(
        list_parameters(BLOOM, torch.float32), 64, whole_layers=True, whole_model=False
    )
    assert found["stage3_prefetch_bucket_size"] == BLOOM_LAYER
    assert found["stage3_max_live_parameters"] == 64_000 + 3 * BLOOM_LAYER
    assert found["stage3_max_reuse_distance"] > 10**15
    assert found["stage3_param_persistence_threshold"] == 0
    found = deepspeed_config.make_bucket_sizes(
        list_parameters(LLAMA, torch.float32), 64, whole_layers=True, whole_model=False
    )
    assert found["stage3_max_live_parameters"] == 3 * LLAMA_LAYER


def test_without_whole_layers_the_buckets_are_the_seeds() -> None:
    found = deepspeed_config.make_bucket_sizes(
        list_parameters(BLOOM, torch.float32), 64, whole_layers=False, whole_model=False
    )
    assert found["reduce_bucket_size"] == 4096
    assert found["stage3_prefetch_bucket_size"] == 3686


def test_a_model_that_one_rank_has_anyhow_is_never_let_go() -> None:
    found = deepspeed_config.make_bucket_sizes(
        list_parameters(BLOOM, torch.float32), 64, whole_layers=True, whole_model=True
    )
    assert found["stage3_param_persistence_threshold"] > 10**15


def test_what_is_gathered_at_a_time_is_counted_in_bytes() -> None:
    bloom, llama = list_parameters(BLOOM, torch.bfloat16), list_parameters(LLAMA, torch.float32)
    assert deepspeed_config.estimate_gathered_bytes(bloom) == 2 * (64_000 + 4 * BLOOM_LAYER)
    assert deepspeed_config.estimate_gathered_bytes(llama) == 4 * (64_000 + 4 * LLAMA_LAYER)


def test_the_users_file_wins_section_by_section(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 7}, "new": 1}))
    ours = deepspeed_config.make_configuration(
        2, torch.bfloat16, {"stage3_prefetch_bucket_size": 1, "reduce_bucket_size": 2}
    )
    both = deepspeed_config.merge(ours, deepspeed_config.read_user_configuration(str(path)))
    assert both["zero_optimization"]["stage3_prefetch_bucket_size"] == 7
    assert both["zero_optimization"]["reduce_bucket_size"] == 2
    assert both["bf16"] == {"enabled": True}
    assert both["new"] == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"zero_optimization": {"stage": 2}}'])
def test_a_file_that_is_not_of_this_stage_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(EngineError, match=f"config={path}"):
        deepspeed_config.read_user_configuration(str(path))
