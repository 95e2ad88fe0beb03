"""Measured bandwidths, and the bound they set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchgen.engine import EngineError
from batchgen.engines.ds_zero import bandwidth
from batchgen.engines.ds_zero.bandwidth import compute_share_of_bound, measure_copy_bandwidth, measure_read_bandwidth

MIB = 1 << 20


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_READ_SECONDS", 0.05)


@pytest.mark.parametrize(("block", "threads"), [(MIB, 8), (16 * MIB, 2), (1, 3), (100_000, 1)])
def test_a_folder_is_read_and_nothing_is_left_in_it(tmp_path: Path, block: int, threads: int) -> None:
    assert measure_read_bandwidth(tmp_path, block_bytes=block, threads=threads, sample_bytes=4 * MIB) > 0
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_measured_is_a_sentence() -> None:
    with pytest.raises(EngineError, match="cannot measure how fast /proc is"):
        measure_read_bandwidth(Path("/proc"), block_bytes=MIB)


def test_without_a_gpu_nothing_is_copied() -> None:
    assert measure_copy_bandwidth(torch.device("cpu"), pinned=True) is None


@pytest.mark.gpu
def test_pinned_memory_is_copied_faster() -> None:
    device = torch.device("cuda", 0)
    pinned, pageable = (measure_copy_bandwidth(device, pinned=pinned) for pinned in (True, False))
    assert pinned is not None
    assert pageable is not None
    assert pinned > pageable > 1e8


def test_a_step_is_compared_with_reading_every_weight_once() -> None:
    # BLOOM in bfloat16 from a path of 13 GB/s, a step of 27.5 s: figures published for DeepNVMe.
    assert compute_share_of_bound(27.5, 352_000_000_000, 13e9) == pytest.approx(0.985, abs=0.001)
    for seconds, rate in ((0, 1e9), (1, 0)):
        with pytest.raises(ValueError, match="must be above 0"):
            compute_share_of_bound(seconds, 1, rate)
