"""Weights that come a layer at a time, in a world of one; test_ds_zero.py has the text of several."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from batchgen.engine import OutOfStep
from batchgen.engines.ds_zero.decoder_layers import are_layers_listed, find_layers
from batchgen.engines.ds_zero.gather import LayerGatherer, raise_out_of_step
from tests import tiny_models as models

IDS = torch.arange(4, 24)[None]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: Any) -> Any:
    """A copy of it as `deepspeed.zero.Init` would leave it on one rank."""
    made = copy.deepcopy(model).eval()
    for parameter in made.parameters():
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
        parameter.ds_tensor = parameter.data.flatten().clone()
        parameter.data = torch.empty(0)
    return made


@pytest.fixture(params=["llama", "bloom", "tied"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    if request.param == "bloom":
        return models.bloom(300, n_layer=5)
    return models.llama(300, num_hidden_layers=5, tie_word_embeddings=request.param == "tied")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def test_a_model_says_the_same_at_its_first_and_later_forwards(model: Any) -> None:
    made = sharded(model)
    layers = find_layers(made)
    assert are_layers_listed(made.config)
    assert len(layers) == 5
    gathered = LayerGatherer(made, layers, torch.device("cpu"), host=True)
    for _ in range(3):
        assert torch.equal(logits(made), logits(model))
    gathered.close()


def test_between_forwards_the_layers_hold_nothing_and_a_tied_embedding_stays(model: Any) -> None:
    made = sharded(model)
    gathered = LayerGatherer(made, find_layers(made), torch.device("cpu"), host=True)
    logits(made)
    assert all(one.numel() == 0 for layer in find_layers(made) for one in layer.parameters())
    tied = made.get_input_embeddings().weight is made.get_output_embeddings().weight
    assert (made.get_input_embeddings().weight.numel() > 0) == tied
    gathered.close()


def test_one_rank_alone_has_all_in_its_place(model: Any) -> None:
    made = sharded(model)
    gathered = LayerGatherer(made, find_layers(made), torch.device("cpu"))
    assert not any(module._forward_pre_hooks for module in made.modules())
    assert torch.equal(logits(made), logits(model))
    assert gathered.elements == sum(one.numel() for one in model.parameters())
    gathered.close()


def test_a_weight_of_another_type_or_of_two_layers_keeps_its_type_and_its_ties() -> None:
    torch.manual_seed(0)
    plain = models.llama(300, num_hidden_layers=3)
    plain.model.layers[1].input_layernorm.weight.data = torch.rand(32).to(torch.bfloat16)
    plain.model.layers[2].mlp.up_proj.weight = plain.model.layers[0].mlp.up_proj.weight
    made = sharded(plain)
    gathered = LayerGatherer(made, find_layers(made), torch.device("cpu"), host=True)
    for _ in range(2):
        assert torch.equal(logits(made), logits(plain))
    assert made.model.layers[1].input_layernorm.weight.dtype == torch.bfloat16
    gathered.close()


def test_a_kind_of_model_that_is_not_known_lists_no_layers() -> None:
    assert not are_layers_listed(PretrainedConfig())


def test_whoever_reads_a_weight_out_of_turn_fails() -> None:
    made = sharded(models.llama(300))
    gathered = LayerGatherer(made, find_layers(made), torch.device("cpu"), host=True)
    logits(made)
    with pytest.raises(RuntimeError):
        find_layers(made)[0].self_attn.o_proj(torch.ones(1, 32))
    gathered.close()


def test_a_forward_that_takes_another_way_gets_the_weights_that_it_asks_for() -> None:
    made = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(7)))
    plain = copy.deepcopy(made)
    made.dtype, made.get_input_embeddings, made.get_output_embeddings = torch.float32, lambda: None, lambda: None
    made = sharded(made)
    gathered = LayerGatherer(made, list(made), torch.device("cpu"), host=True)
    inputs = torch.randn(2, 8)
    for way in (range(7), range(6, -1, -1), (0, 3, 1, 4, 2), range(7)):
        found = expected = inputs
        for number in way:
            found, expected = made[number](found), plain[number](expected)
        assert torch.equal(found, expected), way
    gathered.close()


def test_out_of_memory_inside_a_forward_is_everybodys() -> None:
    def forward() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfStep, match="inside a forward that the ranks make together"):
        raise_out_of_step(forward)()
