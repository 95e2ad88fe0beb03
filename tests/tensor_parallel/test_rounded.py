"""Weights that are rounded while they are copied: which of a model's, and that they are those of the whole."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DbrxConfig, DbrxForCausalLM
from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig

from batchgen.engine import EngineError
from batchgen.models import loading, random_weights
from batchgen.models.quantised.places import get_quantised, widen_all
from batchgen.models.quantised.rounding import Scheme, round_weight
from batchgen.tensor_parallel import copy_weights, map_model, process_group, rounded, split, use_plain_layers
from batchgen.tensor_parallel.adapted import find_additions
from tests import adapters
from tests import tiny_models as models
from tests.models.quantised.test_rounding import equal
from tests.tensor_parallel import test_texts

CPU = torch.device("cpu")

# The matrices that keep their type, besides embeddings and the output matrix.
KEPT: dict[str, set[str]] = {
    "bloom": set(),
    "cohere2": set(),
    "deepseek_v2": {"mlp.gate.weight"},
    "falcon": set(),
    "gpt2": set(),
    "gpt_oss": {"mlp.router.weight", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"},
    "mixtral": {"mlp.gate.weight"},
    "mpt": set(),
    "phi3": set(),
    "qwen2_moe": {"mlp.gate.weight", "mlp.shared_expert_gate.weight"},
    "qwen3_moe": {"mlp.gate.weight"},
}
TABLES = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "wpe.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    scratch = tmp_path_factory.mktemp("rounded")
    settings = {"deepseek_v2": {"kv_lora_rank": 32}}
    builds = {name: partial(test_texts.build, name=name, **settings.get(name, {})) for name in KEPT}
    return {name: models.save(scratch / name, build) for name, build in builds.items()}


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("name", KEPT)
def test_layers_are_rounded_and_all_else_is_kept(
    name: str, kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounded, "_BYTES_AT_ONCE", 20_000)  # an expert or two
    plain = loading.load(str(folders[name]), {"dtype": torch.float32})
    model = map_model(str(folders[name]), None)
    scheme = Scheme(kind)  # type: ignore[arg-type]
    size = copy_weights(model, str(folders[name]), CPU, torch.bfloat16, rounding=scheme)
    kept: set[str] = set()
    wide: dict[str, torch.Tensor] = {}
    held: dict[int, int] = {}  # a tied one once
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            exact = plain.get_submodule(path).get_parameter(own)
            weight = get_quantised(module, own)
            assert parameter.shape == exact.shape
            if weight is None:
                held[id(parameter)] = parameter.nbytes
                assert torch.equal(parameter.float(), exact.to(parameter.dtype).float())
                kept |= {f"{path}.{own}"} if parameter.dim() > 1 else set()
                continue
            held[id(weight)] = weight.nbytes
            assert parameter.untyped_storage().nbytes() == 2, "the parameter is zeros without memory"
            turned = name == "gpt2" or getattr(module, "is_transposed", False)
            matrix = exact.transpose(-1, -2) if turned else exact
            assert weight.shape == matrix.shape
            assert weight.values.is_contiguous()
            expected = round_weight(matrix, Scheme("int4", weight.group) if kind == "int4" else scheme, torch.float32)
            assert equal(weight, expected), path
            widened = weight.widen(torch.bfloat16)
            wide[f"{path}.{own}"] = widened.transpose(-1, -2) if turned else widened
    layers = {path.partition(".layers.")[2].partition(".")[2] for path in kept if not path.endswith(TABLES)}
    assert layers == KEPT[name]
    assert size == sum(held.values())
    assert rounded.count_bytes(model) == size + sum(buffer.nbytes for buffer in model.buffers())
    widen_all(model)
    for path, matrix in wide.items():
        assert torch.equal(model.get_parameter(path), matrix), path


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # DeepSpeed's layer of a rank without rows
@pytest.mark.parametrize("name", ["bloom", "cohere2", "falcon", "mixtral", "mpt", "phi3", "qwen2_moe"])
def test_a_share_of_rows_is_that_of_the_whole(name: str, folders: dict[str, Path]) -> None:
    whole = map_model(str(folders[name]), None)
    copy_weights(whole, str(folders[name]), CPU, torch.float32, rounding=Scheme("int4", 32))
    compared = set()
    with process_group.fake_group(1, 2):
        share = map_model(str(folders[name]), None)
        group = torch.distributed.group.WORLD
        assert group is not None
        split(share, group)
        copy_weights(share, str(folders[name]), CPU, torch.float32, rounding=Scheme("int4", 32))
        use_plain_layers(share, group)
    # Rows of queries, and both halves of what is fused; columns are cut where a group ends.
    for path, module in share.named_modules():
        mine, name_in_whole = get_quantised(module), path.removesuffix(".share")
        if mine is None:
            if getattr(module, "weight", None) is not None and module.weight.numel() == 0:
                compared.add(name_in_whole)  # so narrow that all of its rows are those of the other rank
            continue
        theirs = get_quantised(whole.get_submodule(name_in_whole))
        assert theirs is not None
        wide, all_of_it = mine.widen(), theirs.widen()
        assert mine.shape == module.weight.shape
        if wide.shape[1] < all_of_it.shape[1]:
            assert torch.equal(wide, all_of_it[:, -wide.shape[1] :])
        else:
            rows = {tuple(row.tolist()) for row in all_of_it}
            assert all(tuple(row.tolist()) in rows for row in wide)
            assert len(wide) * 2 == len(all_of_it)
        compared.add(name_in_whole)
    assert compared == {path for path, module in whole.named_modules() if get_quantised(module) is not None}


def test_what_cannot_be_rounded_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    folder = models.save(tmp_path / "narrow", models.llama, hidden_size=40)
    with pytest.raises(EngineError, match=r"has 40 columns, which no group of 128, 64, 32 divides.*--dtype int8"):
        copy_weights(map_model(str(folder), None), str(folder), CPU, torch.float32, rounding=Scheme("int4"))
    with pytest.raises(EngineError, match=r"groups of 64 columns do not divide the 32 columns.*group_size=N"):
        copy_weights(map_model(str(tiny_llama), None), str(tiny_llama), CPU, torch.float32, rounding=Scheme("int4", 64))
    experts = DbrxFFNConfig(hidden_size=64, ffn_hidden_size=64, moe_num_experts=8)
    config = DbrxConfig(
        d_model=64, n_heads=4, n_layers=2, ffn_config=experts, attn_config={"kv_n_heads": 2, "rope_theta": 1e4}
    )
    dbrx = models.save(tmp_path / "dbrx", lambda size: DbrxForCausalLM(config))
    with pytest.raises(EngineError, match=r"--dtype fp8 would round 1\d% of the numbers in the layers of a dbrx model"):
        copy_weights(map_model(str(dbrx), None), str(dbrx), CPU, torch.float32, rounding=Scheme("fp8"))


def test_a_model_without_weights_gets_rounded_random_ones(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "hollow")
    (folder / random_weights.HOLLOW).write_text(json.dumps({"standard_deviation": 0.5}))
    model = map_model(str(folder), None)
    copy_weights(model, str(folder), CPU, torch.float32, rounding=Scheme("int4"))
    weight = get_quantised(model.model.layers[0].mlp.gate_proj)
    assert weight is not None
    assert 0.4 < float(weight.widen().std()) < 0.6


def test_an_adapter_is_added_before_the_weights_are_rounded(tiny_llama: Path, tmp_path: Path) -> None:
    base, merged = shutil.copytree(tiny_llama, tmp_path / "base"), tmp_path / "merged"
    adapter = adapters.save_adapter(base, tmp_path / "adapter", {"target_modules": "all-linear"}, merged=merged)
    model = map_model(str(base), None, str(adapter))
    additions = find_additions(str(adapter), str(base), model.config, None)
    copy_weights(model, str(base), CPU, torch.float32, rounding=Scheme("int4", 32), additions=additions)
    whole = loading.load(str(merged), {"dtype": torch.float32})
    rounded_layers = 0
    for path, module in model.named_modules():
        weight = get_quantised(module)
        if weight is None:
            continue
        exact = whole.get_submodule(path).weight.data
        expected = round_weight(exact, Scheme("int4", 32), torch.float32).widen()
        # The sums of the two have been rounded in another order, which may move a number by a step.
        assert float((weight.widen() - expected).norm() / expected.norm()) < 0.01, path
        plain = round_weight(read_weight(base, path), Scheme("int4", 32), torch.float32).widen()
        assert float((weight.widen() - plain).norm() / plain.norm()) > 0.05, "the adapter makes a difference"
        rounded_layers += 1
    assert rounded_layers == 14


def read_weight(folder: Path, layer: str) -> torch.Tensor:
    weight: torch.Tensor = load_file(folder / "model.safetensors")[f"{layer}.weight"]
    return weight
