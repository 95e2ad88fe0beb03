"""How many rows fit: the estimate, and what is learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, FalconConfig, Gemma3nTextConfig, Gemma4TextConfig, LlamaConfig, MambaConfig

from batchgen.device import free_bytes, host_free_bytes, is_out_of_memory, take_peak_bytes
from batchgen.generation.limits import SizeLimits, count_rows_that_fit
from batchgen.models.footprint import bytes_per_row, cached_heads

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_a_real_failure_of_torchs_allocator_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as refused:
        bytearray(2**62)
    assert is_out_of_memory(refused.value)


def test_another_error_is_not() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(RuntimeError("expected scalar type Half but found Float"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_limit_holds_for_its_length_and_longer_ones() -> None:
    limits = SizeLimits()
    assert limits.max_rows(100) is None
    limits.remember(1000, 8)
    assert [limits.max_rows(n) for n in (1000, 1001, 100_000)] == [8, 8, 8]
    limits.remember(4000, 4)
    assert [limits.max_rows(n) for n in (1000, 4000, 9000)] == [8, 4, 4]
    limits.remember(1000, 4)
    assert limits.max_rows(1000) == 4


def test_a_shorter_batch_may_be_larger_in_proportion() -> None:
    limits = SizeLimits()
    limits.remember(1000, 8)
    shorter = limits.max_rows(100)
    assert shorter is not None
    assert 64 <= shorter <= 80


def test_a_row_takes_what_the_cache_of_a_published_model_takes() -> None:
    llama = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
    )
    bloom = BloomConfig(hidden_size=4096, n_layer=30, n_head=32, vocab_size=250_880)
    for config, a_token in ((llama, 131_072), (bloom, 491_520)):
        one, more = (bytes_per_row(config, prompt_tokens=0, new_tokens=n, item_bytes=2, eager=False) for n in (1, 1001))
        assert more - one == 1000 * a_token
    sdpa, eager = (bytes_per_row(bloom, prompt_tokens=512, new_tokens=1, item_bytes=2, eager=e) for e in (False, True))
    assert eager - sdpa == 32 * 512 * 512 * 6


def test_heads_that_share_one_key_and_models_without_any_are_known_from_the_config() -> None:
    falcon_7b = FalconConfig(hidden_size=4544, num_hidden_layers=32, num_attention_heads=71, multi_query=True)
    assert cached_heads(falcon_7b) == (1, 64)
    falcon_40b = FalconConfig(
        hidden_size=8192, num_attention_heads=128, num_kv_heads=8, multi_query=True, new_decoder_architecture=True
    )
    assert cached_heads(falcon_40b) == (8, 64)
    mamba = MambaConfig(hidden_size=2560, num_hidden_layers=64, vocab_size=50_280, state_size=16, conv_kernel=4)
    assert cached_heads(mamba) == (0, 0)
    few, many = (bytes_per_row(mamba, prompt_tokens=0, new_tokens=n, item_bytes=2, eager=False) for n in (1, 1001))
    assert few == many == 50_280 * 8 + 64 * 5120 * 20 * 2


@pytest.mark.parametrize(
    ("free", "row", "device", "rows"),
    [
        (0, 10, CPU, 1),
        (1000, 100, CPU, 8),
        (1500, 100, CPU, 8),
        (700, 100, GPU, 5),
        (10**9, 1, CPU, 32),
        (10**9, 1, GPU, 512),
    ],
)
def test_rows_are_clamped_and_come_in_eights(free: int, row: int, device: torch.device, rows: int) -> None:
    assert count_rows_that_fit(free, row, device) == rows


def test_more_rows_than_usual_where_a_caller_says_so_but_not_on_a_cpu() -> None:
    assert count_rows_that_fit(10**12, 1000, torch.device("cuda"), 8192) == 8192
    assert count_rows_that_fit(10**6, 1000, torch.device("cuda"), 8192) == 800
    assert count_rows_that_fit(10**12, 1000, torch.device("cpu"), 8192) == 32


def test_free_memory_is_shared_among_the_ranks_of_a_host() -> None:
    assert 0 < free_bytes([CPU], 64) < host_free_bytes() / 32


def test_a_cgroup_of_a_parent_limits_what_is_free(tmp_path: Path) -> None:
    meminfo, membership, cgroups = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "cgroups"
    meminfo.write_text("MemTotal:  8000 kB\nMemAvailable:    4000 kB\nHugePages_Total:       0\n")
    assert host_free_bytes(meminfo, membership, cgroups) == 4000 * 1024
    membership.write_text("1:name=other:/x\n0::/job_7/step_0\n")
    (cgroups / "job_7" / "step_0").mkdir(parents=True)
    (cgroups / "job_7" / "step_0" / "memory.max").write_text("max\n")
    (cgroups / "job_7" / "step_0" / "memory.current").write_text("5\n")
    assert host_free_bytes(meminfo, membership, cgroups) == 4000 * 1024
    (cgroups / "job_7" / "memory.max").write_text("1000000\n")
    (cgroups / "job_7" / "memory.current").write_text("400000\n")
    assert host_free_bytes(meminfo, membership, cgroups) == 600_000
    # Of what it counts as used, files that were read can be forgotten.
    (cgroups / "job_7" / "memory.stat").write_text("anon 100000\ninactive_file 250000\nactive_file 50000\n")
    assert host_free_bytes(meminfo, membership, cgroups) == 850_000


def test_the_peak_of_a_process_without_a_gpu_is_its_resident_memory() -> None:
    before = take_peak_bytes([CPU])
    ballast = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert take_peak_bytes([CPU]) >= max(before, ballast.numel())


def test_sizes_that_differ_by_layer_count_as_the_largest() -> None:
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    gemma4 = Gemma4TextConfig(
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        num_hidden_layers=2,
        **small,
    )
    assert cached_heads(gemma4) == (2, 16)
    each = [
        bytes_per_row(
            Gemma3nTextConfig(intermediate_size=inner, num_hidden_layers=2, num_kv_shared_layers=0, **small),
            prompt_tokens=5,
            new_tokens=5,
            item_bytes=4,
            eager=False,
        )
        for inner in (128, [64, 128])
    ]
    assert each[0] == each[1]
