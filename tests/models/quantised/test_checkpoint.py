"""Quantised checkpoints: what is read is what the formulas of each format say, number for number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from batchgen.models import loading
from batchgen.models.folder import check_weight_files
from batchgen.models.quantised.places import get_quantised, widen_all
from batchgen.tensor_parallel import copy_weights, map_model, process_group, split, use_plain_layers
from tests import tiny_models as models
from tests.models.quantised.checkpoints import CASES, MXFP4, add_cache_scales, write
from tests.sweep.kinds import build

CPU = torch.device("cpu")
SIZES = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 48}  # q_proj has 192 rows, o_proj 192 columns


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("quantised") / "base", models.llama, **SIZES)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_what_its_format_says(name: str, base: Path, tmp_path: Path) -> None:
    case = CASES[name]
    layers = write(case, base, tmp_path / "quantised", tmp_path / "plain")
    expected = loading.load(str(tmp_path / "plain"), {"dtype": torch.float32}).state_dict()

    model = map_model(str(tmp_path / "quantised"), None)
    size = copy_weights(model, str(tmp_path / "quantised"), CPU, torch.float32)
    for layer in layers:
        weight = get_quantised(model.get_submodule(layer))
        assert weight is not None
        assert weight.kind == case.kind
        rounds = weight.shape[-1] % max(case.inputs_group, 1) == 0
        expected_inputs = (case.inputs, case.inputs_group) if rounds else ("", 0)
        assert (weight.inputs, weight.inputs_group) == expected_inputs
        assert weight.group * weight.scales.shape[-1] == weight.shape[-1]
        assert model.get_submodule(layer).weight.untyped_storage().nbytes() == 4
    assert size < 0.6 * sum(tensor.nbytes for tensor in expected.values())
    widen_all(model)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []

    widened = loading.load(str(tmp_path / "quantised"), {"dtype": torch.float32}).state_dict()
    assert widened.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(widened[key], expected[key])] == []


def test_a_head_is_widened_and_layers_lie_in_several_files(base: Path, tmp_path: Path) -> None:
    quantised, case = tmp_path / "quantised", CASES["compressed int4"]
    write(case, base, quantised, tmp_path / "plain")
    head, wide = case.make_layer(260, 256, torch.Generator().manual_seed(4))
    tensors = load_file(quantised / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors |= {f"lm_head.{end}": tensor.contiguous() for end, tensor in head.items()}
    files = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, quantised / file)
    (quantised / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": files}
    (quantised / "model.safetensors.index.json").write_text(json.dumps(index))

    model = map_model(str(quantised), None)
    copy_weights(model, str(quantised), CPU, torch.float32, rounding=None)
    assert get_quantised(model.lm_head) is None
    widen_all(model)
    expected = load_file(tmp_path / "plain" / "model.safetensors") | {"lm_head.weight": wide}
    assert [name for name in expected if not torch.equal(model.get_parameter(name), expected[name])] == []


@pytest.mark.parametrize("name", ["compressed fp8 channels", "compressed int4", "fp8 tensor", ""])
def test_scales_of_a_cache_are_passed_over(name: str, base: Path, tmp_path: Path) -> None:
    """ "": weights of 16 bits, whose cache alone is quantised."""
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    if name:
        write(CASES[name], base, quantised, plain)
    else:
        shutil.copytree(base, quantised)
        shutil.copytree(base, plain)
    add_cache_scales(quantised)
    model = map_model(str(quantised), None)
    copy_weights(model, str(quantised), CPU, torch.float32)
    widen_all(model)
    widened = loading.load(str(quantised), {"dtype": torch.float32})
    expected = loading.load(str(plain), {"dtype": torch.float32}).state_dict()
    for found in (model.state_dict(), widened.state_dict()):
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_the_config_of_the_language_part_says_it(tmp_path: Path) -> None:
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    base = models.save(tmp_path / "base", lambda vocabulary: build("gemma3"))
    layers = write(CASES["compressed int8"], base, quantised, plain)
    config = json.loads((quantised / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (quantised / "config.json").write_text(json.dumps(config))
    check_weight_files(quantised)
    expected = loading.load(str(plain), {"dtype": torch.float32}).state_dict()
    model = map_model(str(quantised), None)
    copy_weights(model, str(quantised), CPU, torch.float32)
    assert sum(get_quantised(module) is not None for module in model.modules()) == len(layers)
    widen_all(model)
    for found in (model.state_dict(), loading.load(str(quantised), {"dtype": torch.float32}).state_dict()):
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def build_mixtral(vocabulary: int, **settings: Any) -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**models.SMALL | {"vocab_size": vocabulary} | settings))


def build_phi3(vocabulary: int, **settings: Any) -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**models.SMALL | {"vocab_size": vocabulary} | settings))


def build_gpt_oss(vocabulary: int, **settings: Any) -> PreTrainedModel:
    made = GptOssForCausalLM(GptOssConfig(**models.SMALL | {"vocab_size": vocabulary} | settings))
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return made


_EXPERTS = {"hidden_size": 256, "intermediate_size": 256, "num_local_experts": 4}
FAMILIES: dict[str, tuple[str, Callable[..., PreTrainedModel]]] = {
    "llama": ("fp8 blocks", partial(models.llama, hidden_size=256, intermediate_size=512, head_dim=64)),
    "llama in int4": ("awq", partial(models.llama, hidden_size=256, intermediate_size=512, head_dim=64)),
    "fused": ("compressed int4, zeros", partial(build_phi3, hidden_size=256, intermediate_size=512)),
    "fused, one scale": ("fp8 tensor", partial(build_phi3, hidden_size=256, intermediate_size=512)),
    "experts": ("fp8 blocks", partial(build_mixtral, **_EXPERTS)),
    "experts with fixed inputs": ("compressed fp8 tensor", partial(build_mixtral, **_EXPERTS)),
    "experts in int4": ("gptq", partial(build_mixtral, **_EXPERTS)),
    "gpt-oss": (
        "",
        partial(build_gpt_oss, hidden_size=64, intermediate_size=96, num_local_experts=4, head_dim=16),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["whole", "split", "spread"])
def test_a_share_is_that_of_the_widened_weights(family: str, way: Any, tmp_path: Path) -> None:
    name, build = FAMILIES[family]
    base = models.save(tmp_path / "base", build)
    write(CASES.get(name, MXFP4), base, tmp_path / "quantised", tmp_path / "plain")
    if way == "spread" and "num_local_experts" not in (base / "config.json").read_text():
        pytest.skip("no experts")
    expected, found = load_share(tmp_path / "plain", way), load_share(tmp_path / "quantised", way)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def load_share(folder: Path, way: Any) -> dict[str, torch.Tensor]:
    """The parameters of the second of two ranks, or of the only one."""
    if way == "whole":
        model = map_model(str(folder), None)
        copy_weights(model, str(folder), CPU, torch.float32, rounding=None)
        widen_all(model)
        return dict(model.named_parameters())
    with process_group.fake_group(1, 2):
        model = map_model(str(folder), None)
        group = torch.distributed.group.WORLD
        assert group is not None
        split(model, group, way)
        copy_weights(model, str(folder), CPU, torch.float32, rounding=None)
        use_plain_layers(model, group)
        widen_all(model)
        return dict(model.named_parameters())
