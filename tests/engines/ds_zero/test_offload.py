"""DeepSpeed's settings of an offload, and the bytes they come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, LlamaConfig

from batchgen.engine import EngineError
from batchgen.engines.ds_zero.offload import NvmeSettings, Offload, plan_cpu, plan_nvme
from batchgen.models.parameters import Parameters, list_parameters

MIB = 1 << 20
FOLDER = Path("/scratch/run")


@pytest.fixture(scope="module")
def bloom_7b() -> Parameters:
    return list_parameters(BloomConfig(vocab_size=250_880, hidden_size=4096, n_layer=30, n_head=32), torch.bfloat16)


def planned(sizes: Parameters, ranks: int = 1, **settings: int) -> Offload:
    return plan_nvme(sizes, ranks, FOLDER, NvmeSettings(pin_memory=True, **settings))


def test_a_buffer_holds_a_ranks_shard_of_the_largest_parameter(bloom_7b: Parameters) -> None:
    alone, of_eight = planned(bloom_7b), planned(bloom_7b, 8)
    assert alone.offload_param["buffer_size"] == 250_880 * 4096
    assert of_eight.offload_param["buffer_size"] == 250_880 * 4096 // 8
    assert alone.locked_bytes == 5 * 250_880 * 4096 * 2 == 8 * of_eight.locked_bytes


def test_blocks_are_small_enough_for_the_shards_to_be_swapped_at_all(bloom_7b: Parameters) -> None:
    # A rank of 8 has 4 MiB of an attention's output weight; DeepSpeed would keep in memory what is below a block.
    assert planned(bloom_7b).block_bytes == 16 * MIB
    assert planned(bloom_7b, 8).block_bytes == 4 * MIB
    assert planned(bloom_7b, 8).file_bytes > 0.99 * bloom_7b.shard_bytes(8)
    large = planned(bloom_7b, 8, block_bytes=16 * MIB)
    assert large.host_bytes - large.locked_bytes > 0.1 * bloom_7b.shard_bytes(8)


def test_what_is_in_files_and_what_stays_in_memory_is_everything(bloom_7b: Parameters) -> None:
    for ranks in (1, 2, 8, 64):
        plan = planned(bloom_7b, ranks)
        whole = plan.file_bytes + plan.host_bytes - plan.locked_bytes
        padding = len(bloom_7b.by_name) * 8 * 1024
        assert bloom_7b.shard_bytes(ranks) <= whole <= bloom_7b.shard_bytes(ranks) + padding


def test_fewer_buffers_are_made_where_five_cannot_be_locked_but_never_too_few(bloom_7b: Parameters) -> None:
    buffer = 250_880 * 4096 * 2
    counts = [planned(bloom_7b, lockable_bytes=n * buffer).offload_param["buffer_count"] for n in (0, 1, 2, 3, 4, 5, 9)]
    assert counts == [2, 2, 2, 3, 4, 5, 5]
    assert planned(bloom_7b, buffer_count=7).locked_bytes == 7 * buffer


def test_there_are_buffers_for_a_whole_layer_and_what_is_tied_and_no_fewer_are_locked() -> None:
    shape: Any = {"vocab_size": 3000, "hidden_size": 896, "intermediate_size": 1024, "num_attention_heads": 8}
    untied, tied = (
        list_parameters(LlamaConfig(**shape, tie_word_embeddings=tie), torch.float32) for tie in (False, True)
    )

    def count(sizes: Parameters, ranks: int, lockable_bytes: int | None) -> Any:
        settings = NvmeSettings(pin_memory=False, whole_layers=True, lockable_bytes=lockable_bytes)
        plan = plan_nvme(sizes, ranks, FOLDER, settings)
        return plan.offload_param["buffer_count"]

    for lockable_bytes in (None, 0, 1 << 40):
        assert count(untied, 3, lockable_bytes) == 7
        assert count(tied, 3, lockable_bytes) == 8
    assert count(untied, 64, 0) == 1  # nothing is swapped; DeepSpeed makes its buffers all the same


def test_the_settings_are_deepspeeds_own(bloom_7b: Parameters) -> None:
    from deepspeed.runtime.swap_tensor.aio_config import get_aio_config
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig

    plan = planned(bloom_7b, 2, threads=4, queue_depth=32)
    # Unknown names are refused by its own type.
    section = DeepSpeedZeroOffloadParamConfig(**plan.offload_param)
    assert (section.device, section.nvme_path, section.pin_memory) == ("nvme", FOLDER, True)
    assert plan.aio is not None
    assert get_aio_config({"aio": plan.aio}) == {**plan.aio, "use_gds": False}
    assert DeepSpeedZeroOffloadParamConfig(**plan_cpu(bloom_7b, 2, pin_memory=False).offload_param).device == "cpu"


def test_on_the_cpu_every_shard_is_in_memory(bloom_7b: Parameters) -> None:
    plan = plan_cpu(bloom_7b, 4, pin_memory=True)
    assert (plan.host_bytes, plan.locked_bytes, plan.file_bytes) == (bloom_7b.shard_bytes(4), 0, 0)
    assert plan.aio is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"threads": 0}, "must be 1 or more"),
        ({"queue_depth": 0}, "must be 1 or more"),
        ({"block_bytes": 0}, "1 byte or more, not 0"),
        ({"queue_depth": 128, "block_bytes": 16 * MIB}, "2 GiB or more, which DeepSpeed cannot count"),
    ],
)
def test_settings_that_deepspeed_would_die_of_are_refused(
    bloom_7b: Parameters, settings: dict[str, int], sentence: str
) -> None:
    with pytest.raises(EngineError, match=sentence):
        planned(bloom_7b, **settings)
