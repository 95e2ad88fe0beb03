"""What `plan` expects of weights of 8 and 4 bits: their bytes are those that are held, and steps are faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from batchgen.commands import main
from batchgen.engines import find
from batchgen.models import shapes
from batchgen.models.definition.model_config import read_config
from batchgen.models.quantised.rounding import Scheme
from batchgen.planning import hardware
from batchgen.planning.forecast import Work, forecasts
from batchgen.planning.speed import Model, Node, Speed
from batchgen.tensor_parallel import copy_weights, map_model
from tests import tiny_models as models
from tests.models.quantised.checkpoints import compressed
from tests.tensor_parallel import test_texts


@pytest.mark.parametrize("name", ["falcon", "gpt2", "gpt_oss", "phi3", "qwen2_moe"])
def test_bytes_are_those_that_a_loaded_model_holds(name: str, tmp_path: Path) -> None:
    folder = models.save(tmp_path / name, lambda size: test_texts.build(size, name).bfloat16())
    for dtype in ("fp8", "int8", "int4"):
        model = map_model(str(folder), None)
        held = copy_weights(model, str(folder), torch.device("cpu"), torch.bfloat16, rounding=Scheme.of(dtype))
        planned = Model.of(read_config(str(folder)), torch.bfloat16, dtype).weights.read_bytes
        assert abs(planned - held) <= 0.01 * held, dtype


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"quant_method": "fp8"}, 0.5),
        ({"quant_method": "awq"}, 0.26),
        ({"quant_method": "gptq"}, 0.26),
        (compressed("pack-quantized", {"num_bits": 4, "strategy": "channel"}), 0.26),
        (compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}), 0.5),
        (compressed("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}), 0.5),
        (compressed("mixed-precision", {"num_bits": 4, "strategy": "channel"}, written="pack-quantized"), 0.26),
        ({"quant_method": "unknown"}, 1.0),
    ],
)
def test_a_quantised_checkpoint_counts_as_it_is(settings: dict[str, Any], share: float) -> None:
    config = shapes.config_of("llama-70b")
    whole = Model.of(config, torch.bfloat16).weights.read_bytes
    config.quantization_config = settings
    held = Model.of(config, torch.bfloat16).weights.read_bytes
    tables = 2 * 2 * config.vocab_size * config.hidden_size
    assert (held - tables) / (whole - tables) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "gpu", "fit"),
    [
        ({"quant_method": "awq"}, "H100", {"paged"}),
        ({"quant_method": "awq"}, "A100-80", {"paged"}),
        ({"quant_method": "fp8"}, "H200", {"paged"}),
        ({"quant_method": "fp8"}, "A100-80", set()),  # which has no floats of 8 bits: `paged` widens them
    ],
)
def test_engines_that_widen_a_quantised_checkpoint_need_its_room(
    settings: dict[str, Any], gpu: str, fit: set[str]
) -> None:
    config = shapes.config_of("llama-70b")
    config.quantization_config = settings
    model, node = Model.of(config, torch.bfloat16), Node(hardware.CARDS[gpu], 1, 1 << 40)
    found = forecasts(model, Work([(100, 100)], 1), node, {}, ("paged", "accelerate", "ds-inference"))
    assert {one.engine for one in found} == {"paged", "accelerate", "ds-inference"}
    assert {one.engine for one in found if not one.why_not} == fit


def test_bloom_176b_fits_on_one_card_in_4_bits_alone() -> None:
    node = Node(hardware.CARDS["H200"], 1)
    config = shapes.config_of("bloom-176b")
    sizes = {dtype: Model.of(config, torch.bfloat16, dtype).weights.read_bytes for dtype in ("", "fp8", "int4")}
    assert sizes["int4"] < node.room < sizes["fp8"] < sizes[""]
    assert 90e9 < sizes["int4"] < 105e9


def test_steps_are_faster_by_the_bytes_and_products_of_many_tokens_by_fp8() -> None:
    paged, node = find("paged"), Node(hardware.CARDS["H200"], 1)
    config = shapes.config_of("llama-70b")

    def make(dtype: str) -> Speed:
        model = Model.of(config, torch.bfloat16, dtype)
        (placement,) = paged.placements(config, model.weights, 1)
        return Speed(paged.pace, placement, model, node)

    half, fp8, int4 = make(""), make("fp8"), make("int4")
    seconds = [speed.step(1, 100.0)[0] for speed in (half, fp8, int4)]
    assert seconds[0] > 1.7 * seconds[1] > 1.7 * 1.5 * seconds[2]
    assert half.prefill(4096) == int4.prefill(4096) == pytest.approx(1.7 * fp8.prefill(4096))
    assert half.prefill(64) == fp8.prefill(64)


def test_only_engines_that_have_the_type_are_planned_with(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "max_new_tokens": 5}\n')
    words = ["plan", str(tmp_path / "in.jsonl"), "--model", "llama-70b", "--gpus", "1", "--gpu", "H200"]
    for dtype, fits in {"bfloat16": False, "fp8": True, "int4": True}.items():
        said = CliRunner().invoke(main, [*words, "--dtype", dtype]).output
        assert ("paged" in said.partition("does not fit")[0]) == fits, said
        assert ("ds-zero" in said) == (dtype == "bfloat16")
        assert "70.6 B parameters" in said
