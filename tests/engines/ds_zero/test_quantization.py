"""4 and 8 bits a weight: what can be quantised, and what it comes to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from batchgen.engine import EngineError
from batchgen.engines.ds_zero.quantization import Bits, check_quantization, make_quantization_section, plan_quantized
from batchgen.models.parameters import list_parameters
from tests import tiny_models as models


def test_the_settings_are_deepspeeds_own() -> None:
    from deepspeed.inference.config import WeightQuantConfig

    given = make_quantization_section(4, 32)
    assert given == {"quantized_initialization": {"num_bits": 4, "group_size": 32, "group_dim": 1, "symmetric": False}}
    assert WeightQuantConfig(**given).quantized_initialization == given["quantized_initialization"]


@pytest.mark.parametrize(("bits", "group_size"), [(8, 16), (4, 16), (4, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_that_deepspeed_stores(
    tiny_llama: Path, bits: Bits, group_size: int, dtype: torch.dtype
) -> None:
    from deepspeed.inference.quantization.utils import _quantize_param

    plain = list_parameters(AutoConfig.from_pretrained(tiny_llama), dtype)
    small = plan_quantized(plain, bits, group_size)
    settings = make_quantization_section(bits, group_size)["quantized_initialization"]
    for name, parameter in plain.by_name.items():
        if not parameter.quantizable:
            assert small.by_name[name] == parameter
            continue
        weight = torch.nn.Parameter(torch.rand(parameter.shape, dtype=dtype), requires_grad=False)
        _quantize_param(weight, settings)
        assert small.by_name[name].numel == weight.numel(), name
    assert any("norm" in name and not parameter.quantizable for name, parameter in plain.by_name.items())
    assert any(parameter.quantizable for parameter in plain.by_name.values())


def test_a_group_that_does_not_divide_a_weight_is_refused_with_one_that_does(tiny_llama: Path) -> None:
    sizes = list_parameters(AutoConfig.from_pretrained(tiny_llama), torch.float32)
    check_quantization(tiny_llama, sizes, 8, 32)
    with pytest.raises(
        EngineError, match=r"embed_tokens\.weight has 32 columns.*groups of 48 at 8 bits: groups of 32 "
    ):
        check_quantization(tiny_llama, sizes, 8, 48)


def test_a_row_that_would_end_within_an_element_is_refused(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "odd", models.llama, intermediate_size=66)
    sizes = list_parameters(AutoConfig.from_pretrained(folder), torch.float32)
    with pytest.raises(EngineError, match="this model cannot be quantised this way"):
        check_quantization(folder, sizes, 4, 2)


def test_weights_saved_in_another_type_than_the_runs_are_refused(tiny_llama: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llama)
    with pytest.raises(EngineError, match="are saved as float32; quantised, they need --dtype float32"):
        check_quantization(tiny_llama, list_parameters(config, torch.bfloat16), 8, 16)
    with pytest.raises(EngineError, match="bfloat16 or float32, not float16"):
        check_quantization(tiny_llama, list_parameters(config, torch.float16), 8, 16)


def test_other_numbers_of_bits_are_refused() -> None:
    with pytest.raises(EngineError, match="4 or 8 bits, not to 3"):
        make_quantization_section(3)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="1 or more, not 0"):
        make_quantization_section(4, 0)
