"""The floor under the time of a step: bytes by bandwidth, or operations by arithmetic."""

from __future__ import annotations

import pytest
import torch

from batchgen.bench.machine import Floor, Machine
from batchgen.models import shapes
from batchgen.models.footprint import find_cache_format
from batchgen.models.parameters import list_parameters

_FAST = 1e30  # so that the other one counts


def floor(shape: str, *, bandwidth: float = _FAST, arithmetic: float = _FAST) -> Floor:
    return Floor.of(shapes.config_of(shape), torch.bfloat16, Machine("a machine", bandwidth, arithmetic))


@pytest.mark.parametrize(
    ("shape", "rows", "share"),
    [
        ("llama-8b", 1, 0.0),  # has no experts
        ("qwen3-30b-a3b", 1, 8 / 128),
        ("qwen3-30b-a3b", 16, 1 - (1 - 8 / 128) ** 16),
        ("mixtral-8x7b", 3, 1 - (1 - 2 / 8) ** 3),
    ],
)
def test_a_decode_step_reads_the_experts_that_its_rows_are_expected_to_need(
    shape: str, rows: int, share: float
) -> None:
    weights = list_parameters(shapes.config_of(shape), torch.bfloat16)
    read = 2 * (weights.total - weights.experts + share * weights.experts)
    assert floor(shape, bandwidth=1.0).decode(rows, 0, 1) == pytest.approx(read)


@pytest.mark.parametrize(
    ("shape", "full", "windowed", "window"),
    [("llama-8b", 131_072, 0, 0), ("gpt-oss-20b", 24_576, 24_576, 128), ("gemma3-12b", 65_536, 327_680, 1024)],
)
def test_each_row_reads_its_cache_and_no_more_of_it_than_a_window(
    shape: str, full: int, windowed: int, window: int
) -> None:
    rows, context, steps = 4, 1000, 50
    machine = floor(shape, bandwidth=1.0)
    lengths = range(context, context + steps)
    cache = rows * sum(length * full + min(length, window) * windowed for length in lengths)
    weights = steps * machine.weights.step_bytes(rows)
    assert machine.decode(rows, context, steps) == pytest.approx(weights + cache)


def test_a_cache_of_8_bits_is_read_in_half_the_time() -> None:
    machine, config = Machine("a machine", 1.0, _FAST), shapes.config_of("llama-8b")
    floors = [Floor.of(config, torch.bfloat16, machine, cache=find_cache_format(name)) for name in ("auto", "fp8")]
    wide, narrow = (one.decode(4, 1000, 1) - one.weights.step_bytes(4) for one in floors)
    assert narrow / wide == pytest.approx(129 / 256)


@pytest.mark.parametrize(
    ("shape", "computed"),
    [
        ("llama-8b", 8_030_261_248 - 128_256 * 4096),
        ("bloom-560m", 559_214_592),  # its embedding is its head
        ("qwen3-30b-a3b", 3_353_032_704 - 151_936 * 2048),
    ],
)
def test_a_token_is_computed_with_the_active_parameters_without_the_embedding(shape: str, computed: int) -> None:
    assert floor(shape, arithmetic=1.0).prefill(3, 100) == pytest.approx(300 * 2 * computed)
