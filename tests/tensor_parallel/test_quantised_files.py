"""`batchgen quantise`: what it writes is, number for number, what the same `--dtype` makes while a model is loaded."""

from __future__ import annotations

import json
import resource
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from batchgen.engine import EngineError
from batchgen.models import ResolvedModel, resolve
from batchgen.models.quantised.places import get_quantised
from batchgen.models.quantised.rounding import Scheme
from batchgen.tensor_parallel import copy_weights, map_model, write_quantised, written_folder
from tests import tiny_models as models
from tests.models.quantised.checkpoints import add_cache_scales
from tests.models.quantised.test_rounding import equal
from tests.sweep import kinds
from tests.tensor_parallel import test_texts

CPU = torch.device("cpu")
REFUSED = {
    "gpt2": r"\S+\.c_attn\.weight as \[inputs, outputs\]",
    "gpt_oss": r"all experts of a layer in one tensor, \S+\.experts\.gate_up_proj",
    "granitemoe": r"all experts of a layer in one tensor, \S+\.input_linear\.weight",
}
BUILDS: dict[str, dict[str, Any]] = {
    "cohere2": {},
    "deepseek_v2": {"kv_lora_rank": 32},
    "falcon": {},
    "mixtral": {},
    "phi3": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
}


def resolved(folder: Path) -> ResolvedModel:
    return resolve(str(folder), folder, lambda sentence: None)


def write(folder: Path, out: Path, dtype: str, group_size: int = 0) -> Path:
    return write_quantised(resolved(folder), out, dtype, group_size, lambda sentence: None)


def load(folder: Path, rounding: Scheme | None) -> Any:
    model = map_model(str(folder), None)
    copy_weights(model, str(folder), CPU, torch.bfloat16, rounding=rounding)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In bfloat16."""
    scratch = tmp_path_factory.mktemp("quantised")

    def build(name: str, vocabulary: int) -> Any:
        return test_texts.build(vocabulary, name, **BUILDS[name]).bfloat16()

    return {name: models.save(scratch / name, partial(build, name)) for name in BUILDS}


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("name", BUILDS)
def test_it_loads_to_the_numbers_of_the_same_dtype(
    name: str, dtype: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written_folder, "_FILE_BYTES", 60_000)
    out = write(folders[name], tmp_path / "out", dtype)
    expected, found = load(folders[name], Scheme.of(dtype)), load(out, None)
    compared = 0
    for (path, module), other in zip(expected.named_modules(), found.modules(), strict=True):
        for own, parameter in module.named_parameters(recurse=False):
            weight, read = get_quantised(module, own), get_quantised(other, own)
            if weight is None:
                assert read is None
                assert torch.equal(parameter, other.get_parameter(own)), path
                continue
            assert read is not None, path
            assert equal(weight, read), path
            assert read.scales.dtype == weight.scales.dtype
            compared += 1
    assert compared >= 8
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(names) > 1
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"


def test_the_files_are_those_of_compressed_tensors(folders: dict[str, Path], tmp_path: Path) -> None:
    """Read by the formulas of the format alone."""
    out = write(folders["phi3"], tmp_path / "out", "int4", 32)
    config = json.loads((out / "config.json").read_bytes())
    settings = config["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["ignore"] == ["lm_head"]
    (group,) = settings["config_groups"].values()
    assert group["weights"] == {
        "num_bits": 4,
        "type": "int",
        "dynamic": False,
        "symmetric": False,
        "strategy": "group",
        "group_size": 32,
    }
    assert config["dtype"] == "bfloat16"
    assert {path.name for path in out.iterdir()} >= {"tokenizer.json", "generation_config.json", "chat_template.jinja"}
    tensors = load_file(out / "model.safetensors")
    layer = "model.layers.1.mlp.down_proj.weight"
    rows, columns = tensors[f"{layer}_shape"].tolist()
    bits = torch.arange(0, 32, 4)
    numbers = (tensors[f"{layer}_packed"][..., None] >> bits & 15).flatten(1)[:, :columns] - 8
    zeros = (tensors[f"{layer}_zero_point"][:, None] >> bits[:, None] & 15).flatten(0, 1)[:rows] - 8
    scales = tensors[f"{layer}_scale"].float()
    wide = (numbers - zeros.repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
    exact = load_file(folders["phi3"] / "model.safetensors")[layer].float()
    assert wide.shape == exact.shape
    assert float((wide - exact).norm() / exact.norm()) < 0.1
    assert f"{layer}" not in tensors


def test_settings_of_a_cache_alone_are_no_quantised_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(folders["phi3"], tmp_path / "model")
    add_cache_scales(model)
    made = [
        load_file(write(one, tmp_path / one.name / "out", "fp8") / "model.safetensors")
        for one in (model, folders["phi3"])
    ]
    assert made[0].keys() == made[1].keys()
    assert all(
        torch.equal(tensor.view(torch.uint8), made[1][name].view(torch.uint8)) for name, tensor in made[0].items()
    )


def test_what_cannot_be_written_is_refused_and_leaves_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    out = write(folders["phi3"], tmp_path / "out", "fp8")
    with pytest.raises(EngineError, match="out exists"):
        write(folders["phi3"], out, "fp8")
    with pytest.raises(EngineError, match=r"quantised already \(compressed-tensors"):
        write(out, tmp_path / "twice", "fp8")
    with pytest.raises(EngineError, match="groups of 128 columns do not divide the 64 columns"):
        write(folders["phi3"], tmp_path / "groups", "int4", 128)
    for name, form in REFUSED.items():
        odd = models.save(tmp_path / "odd" / name, partial(test_texts.build, name=name))
        with pytest.raises(EngineError, match=rf"type {name} keep {form}, which .* --dtype int8. rounds it each time"):
            write(odd, tmp_path / name, "int8")
    joined = models.save(tmp_path / "joined", lambda vocabulary: kinds.build("hrm_text"))
    with pytest.raises(EngineError, match=r"type hrm_text keep \S+_proj.weight and \S+_proj.weight as one tensor"):
        write(joined, tmp_path / "joined-rounded", "int8")

    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, usual[1]))  # as a disk that is full
    try:
        with pytest.raises(EngineError, match=r"cannot write .*full: .*File too large"):
            write(folders["phi3"], tmp_path / "full", "fp8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "odd", "joined"}
