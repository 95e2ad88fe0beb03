"""Forecasts of mixtures of experts and of layers with windows: by what a step reads, and what a row keeps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from batchgen import engines
from batchgen.commands import main
from batchgen.engine import Pace, Placement
from batchgen.planning import hardware
from batchgen.planning.forecast import Expected, Model, Node
from batchgen.planning.speed import Speed
from tests.planning.test_forecast import model
from tests.sweep.kinds import make_config

PAGED = engines.find("paged").pace


def step_seconds(shape: str, rows: int, context: float, pace: Pace = PAGED, card: str = "H200") -> float:
    """Seconds of a decode step of a whole model on one GPU with room for it, as no engine need be able to run it."""
    sized = model(shape)
    placement = Placement((), 1, 1, device=sized.weights.read_bytes)
    return Speed(pace, placement, sized, Node(hardware.CARDS[card], 1)).step(rows, context)[0]


def test_a_step_of_a_mixture_reads_the_experts_that_its_rows_need() -> None:
    weights = model("qwen3-30b-a3b").weights
    bandwidth = PAGED.read_share * hardware.CARDS["H200"].bandwidth
    quiet = dataclasses.replace(PAGED, layer_seconds=0.0)
    # Eight of 128 experts are a sixteenth; of 16 rows, 64 % of them are expected to have one; of 512, all.
    for rows, share in ((1, 1 / 16), (16, 0.644), (512, 1.0)):
        read = 2 * (weights.total - weights.experts + share * weights.experts)
        assert step_seconds("qwen3-30b-a3b", rows, 0, quiet) == pytest.approx(read / bandwidth, rel=0.01)
    # `generate` copies the experts of each row, and takes longer with every one of them.
    copying = engines.find("accelerate").pace
    assert step_seconds("qwen3-30b-a3b", 512, 300, copying) > 10 * step_seconds("qwen3-30b-a3b", 512, 300)
    assert step_seconds("llama-8b", 512, 300, copying) < 10 * step_seconds("llama-8b", 512, 300)


def test_a_prompt_of_a_mixture_is_computed_with_its_active_parameters() -> None:
    seconds = {}
    for shape in ("qwen3-30b-a3b", "llama-8b"):
        sized = model(shape)
        placement = Placement((), 1, 1, device=sized.weights.read_bytes)
        seconds[shape] = Speed(PAGED, placement, sized, Node(hardware.CARDS["H200"], 1)).prefill(10_000)
    assert seconds["qwen3-30b-a3b"] / seconds["llama-8b"] == pytest.approx(3_353_032_704 / 8_030_261_248)


def test_layers_with_a_window_read_and_keep_no_more_than_it() -> None:
    rows, context = 64, 20_000
    more = [step_seconds("gemma3-12b", rows, length) for length in (context, 2 * context)]
    cache = 2 * 2 * 8 * 256 * 8  # bytes a token of the 8 layers of 48 that see all
    assert more[1] - more[0] == pytest.approx(rows * context * cache / hardware.CARDS["H200"].bandwidth, rel=0.1)
    sized, node = model("gemma3-12b"), Node(hardware.CARDS["H200"], 1)
    placement = Placement((), 1, 1, device=sized.weights.read_bytes)
    # Pages of so many tokens: a window that begins within a page touches one more than it fills.
    fit = {
        size: Expected(dataclasses.replace(PAGED, page_size=size), placement, sized, node, {}).find_largest_batch(
            (16, context)
        )
        for size in (1, 16, context)
    }
    assert 0.97 * fit[1] < fit[16] <= fit[1]
    assert fit[16] > 4 * fit[context] > 0


@pytest.mark.parametrize(
    ("shape", "sentence", "values"),
    [
        (
            "qwen3-30b-a3b",
            "30.5 B parameters, of which 3.4 B are active for a token; "
            "98,304 bytes of KV cache for a token in 48 layers\n",
            (30_532_122_624, 3_353_032_704, [(None, 48, 98_304)]),
        ),
        (
            "gpt-oss-20b",
            "20.9 B parameters, of which 4.2 B are active for a token; "
            "49,152 bytes of KV cache for a token in 24 layers, "
            "of which 12 (24,576 bytes) need the last 128 tokens alone\n",
            (20_914_757_184, 4_187_440_704, [(128, 12, 24_576), (None, 12, 24_576)]),
        ),
        (
            "gemma3-12b",
            "11.8 B parameters; 393,216 bytes of KV cache for a token in 48 layers, "
            "of which 40 (327,680 bytes) need the last 1,024 tokens alone\n",
            (11_766_034_176, 11_766_034_176, [(1024, 40, 327_680), (None, 8, 65_536)]),
        ),
    ],
)
def test_the_command_says_active_parameters_and_the_cache_by_kind_of_layer(
    shape: str, sentence: str, values: tuple[int, int, list[tuple[int | None, int, int]]], tmp_path: Path
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a b c"}\n')
    words = ["plan", str(prompts), "--model", shape, "--gpu", "H200"]
    said = CliRunner().invoke(main, words).stdout
    assert sentence in said
    assert "the fastest that fits: batchgen run" in said
    described = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)["model"]
    kinds = [(kind["window"], kind["layers"], kind["bytes_per_token"]) for kind in described["kv_cache"]]
    assert (described["parameters"], described["active_parameters"], kinds) == values


def test_a_model_without_attention_has_no_cache_in_words() -> None:
    sized = Model.of(make_config("mamba"), torch.float32)
    assert str(sized).endswith(" parameters; no KV cache")
