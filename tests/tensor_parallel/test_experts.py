"""Experts over ranks: which way, whose bytes, and that nothing is read but a rank's share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from batchgen.models import loading, lora, resolve, split_folder
from batchgen.models.parameters import list_parameters
from batchgen.models.shapes import config_of
from batchgen.tensor_parallel import (
    copy_weights,
    map_model,
    placements,
    process_group,
    read_split,
    split,
    write_split,
)
from batchgen.tensor_parallel.experts import Way, choose_way, divide, find_largest_share
from batchgen.tensor_parallel.file_views import Pieces, find_pieces
from tests import adapters
from tests import tiny_models as models
from tests.tensor_parallel.test_weights import resident

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("experts", "inner", "ranks", "way"),
    [
        (8, 14336, 2, "split"),  # Mixtral-8x7B
        (8, 14336, 8, "split"),
        (128, 768, 2, "split"),  # Qwen3-30B-A3B
        (128, 768, 8, "spread"),  # parts of 64 and 128: half of a product would be waste
        (32, 2880, 2, "split"),  # gpt-oss-20b
        (64, 1408, 4, "split"),  # DeepSeek-V2-Lite
        (4, 32, 2, "spread"),
        (3, 32, 2, "split"),  # there is no other way
    ],
)
def test_the_way_is_the_one_with_less_waste(experts: int, inner: int, ranks: int, way: Way) -> None:
    assert choose_way(experts, inner, ranks) == way


@pytest.mark.parametrize(
    ("inner", "ranks", "parts"),
    [(14336, 2, [7168, 7168]), (2880, 2, [1472, 1408]), (768, 8, [128] * 4 + [64] * 4), (100, 3, [34, 33, 33])],
)
def test_parts_are_whole_tiles_that_make_up_the_whole(inner: int, ranks: int, parts: list[int]) -> None:
    assert divide(inner, ranks) == parts
    assert sum(parts) == inner


def test_pieces_are_cut_across_their_joints() -> None:
    whole = torch.arange(60.0).view(2, 10, 3)
    for cuts in ([10], [4, 6], [1, 2, 3, 4]):
        pieces = Pieces([list(expert.split(cuts)) for expert in whole], 0)
        assert pieces.shape == whole.shape
        for first, length in itertools.product(range(10), range(1, 4)):
            if first + length <= 10:
                spans = [(first, length), (0, 2)]
                expected = torch.cat([whole[:, first : first + length], whole[:, :2]], 1)
                assert torch.equal(pieces.cut(spans).assemble(CPU), expected)
        placeholder = pieces.make_placeholder()
        assert placeholder.shape == whole.shape
        assert placeholder.untyped_storage().nbytes() == 4
        assert torch.equal(Pieces.of(placeholder, 0).assemble(CPU), whole)


def build_mixtral(vocabulary: int, **settings: Any) -> MixtralForCausalLM:
    """Eight experts a layer, which a saved model holds apart."""
    sizes = {"num_local_experts": 8, "num_key_value_heads": 4}
    return MixtralForCausalLM(MixtralConfig(**models.SMALL | {"vocab_size": vocabulary} | sizes | settings))


def build_gpt_oss(vocabulary: int, **settings: Any) -> GptOssForCausalLM:
    """Experts with biases, of which a saved model holds all together, with gates and what is gated by turns."""
    sizes = {"num_local_experts": 8, "num_key_value_heads": 4, "head_dim": 8}
    made = GptOssForCausalLM(GptOssConfig(**models.SMALL | {"vocab_size": vocabulary} | sizes | settings))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return made


@pytest.mark.parametrize("build", [build_mixtral, build_gpt_oss])
@pytest.mark.parametrize("way", ["split", "spread"])
def test_the_shares_of_all_ranks_make_up_what_transformers_loads(build: Any, way: Way, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", partial(build, intermediate_size=96))
    whole = AutoModelForCausalLM.from_pretrained(folder)
    mapped = map_model(str(folder), None)
    copy_weights(mapped, str(folder), CPU, torch.float32)
    for name, parameter in whole.named_parameters():
        assert torch.equal(mapped.get_parameter(name), parameter)
    hidden, weights = torch.randn(20, 32), torch.rand(20, 3)
    index = torch.stack([torch.randperm(8)[:3] for _ in range(20)])
    ranks = 3 if way == "split" else 2
    parts = [compute_share(folder, (rank, ranks), way, (hidden, index, weights)) for rank in range(ranks)]
    with torch.inference_mode():
        expected = whole.model.layers[1].mlp.experts(hidden, index, weights)
    assert torch.allclose(sum(parts), expected, atol=1e-5 * float(expected.abs().max()))
    assert all(not torch.allclose(part, expected, atol=0.1) for part in parts)


def compute_share(folder: Path, place: tuple[int, int], way: Way, arguments: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the experts of one rank of several add to the output; no other rank is there."""
    with process_group.fake_group(*place), torch.inference_mode():
        model = map_model(str(folder), None)
        group = torch.distributed.group.WORLD
        assert group is not None
        split(model, group, way)
        copy_weights(model, str(folder), CPU, torch.float32)
        output: torch.Tensor = model.model.layers[1].mlp.experts(*arguments)
    return output


@pytest.mark.parametrize("way", ["split", "spread"])
def test_experts_that_lie_apart_are_read_by_the_rank_that_keeps_them(way: Way, tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    folder = models.save(tmp_path / "model", partial(build_mixtral, **shape))
    # What loading and splitting import and allocate for good is there before the measurement.
    for measured in (False, True):
        before = resident()
        with process_group.fake_group(1, 2):
            model = map_model(str(folder), None)
            whole = sum(parameter.nbytes for parameter in model.parameters())
            group = torch.distributed.group.WORLD
            assert group is not None
            split(model, group, way)
            views = resident()
            copy_weights(model, str(folder), CPU, torch.float32)
        after = resident()
        share = sum(parameter.nbytes for parameter in model.parameters())
        assert whole > 100e6
        assert share < 0.52 * whole
        if measured:
            assert views["RssAnon"] - before["RssAnon"] < 0.05 * whole
            assert after["RssAnon"] - before["RssAnon"] < 1.2 * share
            assert after["RssFile"] - before["RssFile"] < 0.1 * share, "pages of the files are let go"
        del model


@pytest.mark.parametrize("case", ["attention alone", "one parameter of the experts", "matrices of single experts"])
def test_an_adapter_of_experts_is_merged_into_placeholders(case: str, tmp_path: Path) -> None:
    base = adapters.save_base(tmp_path / "base", "mixtral")
    settings = adapters.CASES["mixtral"].get(case, {"target_modules": ["q_proj"]})
    adapter = adapters.save_adapter(base, tmp_path / "adapter", settings)
    if case == "matrices of single experts":
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        for name, weight in load_file(base / "model.safetensors").items():
            if ".experts.2." in name:
                key = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(4, weight.shape[1])
                tensors[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], 4)
        save_file(tensors, file)
    expected = loading.load(str(base), {"dtype": torch.float32}, adapter=str(adapter))
    mapped = map_model(str(base), None, str(adapter))
    experts = mapped.model.layers[0].mlp.experts
    assert (find_pieces(experts.down_proj) is None) == (case == "one parameter of the experts")
    changes = lora.place_by_config(lora.read_adapter(str(adapter)), mapped.config).whole
    products = {name: change.compute_product for name, change in changes.items() if change.is_low_rank}
    copy_weights(mapped, str(base), CPU, torch.float32, additions=products)
    for name, parameter in expected.named_parameters():
        assert torch.equal(mapped.get_parameter(name), parameter), name


def test_files_by_rank_hold_the_shares_of_experts(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", build_gpt_oss)
    out = write_split(resolve(str(folder), tmp_path, print), tmp_path / "parts", 2, "float32", lambda sentence: None)
    layout = split_folder.read(out)
    assert layout is not None
    for rank in range(2):
        with process_group.fake_group(rank, 2):
            group = torch.distributed.group.WORLD
            assert group is not None
            model = map_model(str(folder), None)
            split(model, group)
            copy_weights(model, str(folder), CPU, torch.float32)
            again = read_split(out, layout, group, CPU, None)
        expected, found = dict(model.named_parameters()), dict(again.named_parameters())
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_plans_count_the_largest_share_of_experts() -> None:
    assert find_largest_share(32, 2880, 2) == pytest.approx(1472 / 2880)
    config = config_of("gpt-oss-20b")
    weights = list_parameters(config, torch.bfloat16)
    by_ranks = {one.sharing: one.device for one in placements(config, weights, 2, evenly=True)}
    assert by_ranks[1] == weights.read_bytes
    rest = weights.total - weights.experts
    assert by_ranks[2] == pytest.approx(2 * (rest / 2 + weights.experts * 1472 / 2880), rel=1e-6)
