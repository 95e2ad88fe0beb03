"""Quantised checkpoints that are not read, or are damaged: each is a sentence, before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from batchgen.engine import EngineError
from batchgen.models import loading, resolve
from batchgen.models.definition.errors import ModelError
from batchgen.models.definition.model_config import read_config
from batchgen.models.int8 import Int8Weight
from batchgen.models.quantised.mxfp4 import Mxfp4
from batchgen.models.quantised.stored import list_tensors
from batchgen.tensor_parallel import copy_weights, map_model, process_group, split, write_quantised
from tests import tiny_models as models
from tests.models.quantised.checkpoints import CASES, compressed, mxfp4, write
from tests.models.quantised.test_checkpoint import SIZES
from tests.tensor_parallel import test_texts

_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
_FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
_IN_GROUPS = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "group", "group_size": 64}
_GROUP = compressed("pack-quantized", _INT4)
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}

SETTINGS: list[tuple[Mapping[str, Any], str]] = [
    ({"quant_method": "fp8", "fmt": "e5m2"}, "by fp8 with fmt 'e5m2'"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, r"by fp8 with weight_block_size \[128\]"),
    ({"quant_method": "fp8", "activation_scheme": "token"}, "activation_scheme 'token'"),
    (_AWQ | {"bits": 8}, "by awq with bits 8"),
    (_AWQ | {"version": "gemv"}, "version 'gemv'"),
    (_AWQ | {"zero_point": False}, "zero_point False"),
    (_AWQ | {"group_size": 7}, "group_size 7"),
    (_GPTQ | {"bits": 3}, "by gptq with bits 3"),
    (_GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    (_GPTQ | {"dynamic": {"-:.*lm_head": {}, "+:.*down": {"bits": 8}}}, r"dynamic: '\+:\.\*down'"),
    (compressed("nvfp4-pack-quantized", {"num_bits": 4, "type": "float"}), "format 'nvfp4-pack-quantized'"),
    (compressed("mxfp4-pack-quantized", {"num_bits": 4, "type": "float"}), "format 'mxfp4-pack-quantized'"),
    (compressed("pack-quantized", _INT4 | {"num_bits": 8}), "'pack-quantized', int of 8 bits"),
    (compressed("pack-quantized", _INT4 | {"actorder": "group"}), "actorder 'group'"),
    (compressed("pack-quantized", _INT4, {"num_bits": 8, "type": "int"}), "weights of int4 and inputs of type int"),
    (compressed("float-quantized", _FP8 | {"strategy": "group"}), "strategy 'group'"),
    (compressed("float-quantized", _FP8, {"num_bits": 8, "type": "float", "dynamic": "local"}), "dynamic 'local'"),
    (compressed("float-quantized", _FP8, {"num_bits": 8, "type": "float", "strategy": "token"}), "strategy 'token'"),
    (
        compressed("float-quantized", _FP8, _IN_GROUPS),
        "strategy 'group', 64 columns each, beside weights with other groups",
    ),
    (
        compressed("float-quantized", _FP8 | {"strategy": "block", "block_structure": [128, 128]}, _IN_GROUPS),
        "strategy 'group', 64 columns each",
    ),
    (
        compressed("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        r"zeros \(symmetric false\)",
    ),
    (_GROUP | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
    (_GROUP | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    (_GROUP | {"config_groups": {}}, "no config_groups"),
    (_GROUP | {"config_groups": {"group_0": 5}}, "settings that cannot be understood"),
    (_GROUP | {"config_groups": {"group_0": {"weights": _INT4 | {"group_size": [4]}}}}, r"group_size \[4\]"),
    (_GROUP | {"sparsity_config": 3}, "settings that cannot be understood"),
    (_GPTQ | {"dynamic": 3}, "settings that cannot be understood"),
    (compressed("float-quantized", _FP8 | {"strategy": "block", "block_structure": ["a"]}), r"block_structure \['a'\]"),
    (compressed("float-quantized", _FP8 | {"strategy": "block"}), "blocks of no size"),
]


def change_config(folder: Path, settings: Mapping[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@pytest.mark.parametrize(("settings", "sentence"), SETTINGS)
def test_a_detail_that_is_not_read_is_named(settings: Mapping[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", models.llama)
    (folder / "model.safetensors").write_bytes(b"nothing of it is read")
    change_config(folder, settings)
    with pytest.raises(ModelError, match=rf"config\.json: .*{sentence}.*take the model in another precision"):
        read_config(str(folder))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("damaged")
    base = models.save(folder / "base", models.llama, **SIZES)

    def make(name: str) -> Path:
        out = folder / f"{len(list(folder.iterdir()))}"
        write(CASES[name], base, out, out.with_suffix(".plain"))
        return out

    return make


Tensors = dict[str, torch.Tensor]
_FLOATS_OF_8_BITS = torch.ones(192).to(torch.float8_e4m3fn)
_Q, _DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value})


DAMAGES: list[tuple[str, Callable[[Tensors], object], str]] = [
    ("fp8 blocks", drop(f"{_Q}.weight_scale_inv"), rf"no file of the model holds {_Q}\.weight_scale_inv"),
    ("fp8 blocks", drop(f"{_Q}.weight"), rf"not complete: {_Q}\.weight \(one of 1\) is missing"),
    ("fp8 blocks", put(f"{_Q}.weight_scale_inv", torch.ones(1, 2)), r"shape \[1, 2\], where .* make it \[2, 2\]"),
    ("fp8 blocks", put(f"{_Q}.weight_scale_inv", torch.ones(2, 2).int()), "is I32, where .* makes it F32 or BF16"),
    ("fp8 tensor", drop(f"{_Q}.activation_scale"), rf"no file of the model holds {_Q}\.activation_scale"),
    ("compressed int8", drop(f"{_Q}.weight_scale"), rf"holds {_Q}\.weight as I8, which is not in the format"),
    ("compressed int4", drop(f"{_Q}.weight_shape"), rf"no file of the model holds {_Q}\.weight_shape"),
    ("awq", drop(f"{_DOWN}.qzeros"), rf"no file of the model holds {_DOWN}\.qzeros"),
    ("awq", put("model.layers.0.mlp.act.scales", torch.ones(384)), r"outputs of an activation \(model\.layers\.0"),
    ("gptq by act", put(f"{_DOWN}.g_idx", torch.zeros(384).int()), r"down_proj\.g_idx does not give each group 64"),
    ("gptq by act", drop(f"{_DOWN}.g_idx"), rf"no file of the model holds {_DOWN}\.g_idx"),
    ("compressed int8", put(f"{_Q}.weight", torch.ones(1, 192, 256).char()), r"\[1, 192, 256\], .*as matrices alone"),
    ("compressed int8", put(f"{_Q}.weight_scale", torch.ones(192, 1).byte()), "is U8, where .* makes it F32 or BF16"),
    ("compressed fp8 blocks", put(f"{_Q}.weight", _FLOATS_OF_8_BITS), r"shape \[192\], .*as matrices alone"),
    ("compressed int4", put(f"{_Q}.weight_shape", torch.tensor([192])), r"weight_shape has the shape \[1\], where"),
    ("gptq", put(f"{_Q}.qweight", torch.ones(3, 192).int()), r"qzeros has the shape \[4, 24\], where .* it \[1, 24\]"),
]


@pytest.mark.parametrize(("case", "damage", "sentence"), DAMAGES)
def test_a_damaged_checkpoint_is_a_sentence(
    case: str, damage: Callable[[Tensors], object], sentence: str, written: Callable[[str], Path]
) -> None:
    folder = written(case)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=sentence):
        loading.load(str(folder), {"dtype": torch.float32})
    with pytest.raises(ModelError, match=sentence):
        read_mapped(str(folder))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (drop("experts.up_scales"), r"holds experts\.up_blocks, but no file of the model holds experts\.up_scales,"),
        (drop("experts.up_blocks"), r"holds experts\.up_scales, but no file of the model holds experts\.up_blocks,"),
        (put("experts.up_blocks", torch.zeros(4, 64, 32).byte()), r"\[4, 64, 32\], where .* make it \[4, 64, 2, 16\]"),
        (put("experts.up_scales", torch.ones(4, 64, 2)), "up_scales is F32, where .* makes it U8 or F8_E8M0"),
    ],
)
def test_damaged_experts_in_4_bits_are_a_sentence(
    damage: Callable[[Tensors], object], sentence: str, tmp_path: Path
) -> None:
    tensors, _ = mxfp4(4, 64, 64, torch.Generator().manual_seed(5))
    stored = {f"experts.up_{end}": tensor for end, tensor in tensors.items()}
    damage(stored)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=sentence):
        Mxfp4.of({}).find_weights(list_tensors([tmp_path / "model.safetensors"]))


def read_mapped(folder: str, rounding: type[Int8Weight] | None = None) -> None:
    copy_weights(map_model(folder, None), folder, torch.device("cpu"), torch.float32, rounding=rounding)


def test_plain_weights_under_the_name_of_a_format_are_a_sentence(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", models.llama)
    change_config(folder, _AWQ)
    with pytest.raises(ModelError, match=r"config\.json says awq, and no tensor in the files beside it"):
        loading.load(str(folder), {})


def test_weights_of_another_model_are_a_sentence(written: Callable[[str], Path]) -> None:
    folder = written("awq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    for load in (read_mapped, lambda model: loading.load(model, {"dtype": torch.float32})):
        with pytest.raises(ModelError, match=r"more layers than its config\.json says: model\.layers\.1\."):
            load(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    for load in (read_mapped, lambda model: loading.load(model, {"dtype": torch.float32})):
        with pytest.raises(ModelError, match=r"down_proj\.weight is \[256, 384\], and should be \[256, 256\]"):
            load(str(folder))


def assert_no_share(folder: Path, sentence: str) -> None:
    """One of two ranks is refused its share of the model in `folder` as its weights are copied."""
    with process_group.fake_group(1, 2):
        model = map_model(str(folder), None)
        group = torch.distributed.group.WORLD
        assert group is not None
        split(model, group)
        with pytest.raises(EngineError, match=sentence):
            copy_weights(model, str(folder), torch.device("cpu"), torch.float32, rounding=None)


def test_columns_in_act_order_are_not_cut(written: Callable[[str], Path]) -> None:
    assert_no_share(written("gptq by act"), r"columns 96 to 192.*desc_act.*Leave --tp out")


def test_rows_in_another_order_are_refused(tmp_path: Path) -> None:
    """A copy of a placeholder has no numbers."""
    base = models.save(tmp_path / "mpt", lambda size: test_texts.build(size, "mpt"))
    source = resolve(str(base), base, lambda sentence: None)
    folder = write_quantised(source, tmp_path / "int8", "int8", 0, lambda sentence: None)
    assert_no_share(folder, r"rows of \S+\.Wqkv\.weight into another order.*Leave --tp out")


def test_quantised_weights_are_not_rounded_once_more(written: Callable[[str], Path]) -> None:
    folder = str(written("awq"))
    with pytest.raises(EngineError, match="are quantised as they are; leave out --dtype int8"):
        read_mapped(folder, rounding=Int8Weight)
