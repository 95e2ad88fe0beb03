"""How many rows fit: the estimate, and what is learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchgen.device import free_bytes, host_free_bytes, is_out_of_memory, take_peak_bytes
from batchgen.generation.limits import SizeLimits, count_rows_that_fit

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
