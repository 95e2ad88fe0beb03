"""Quantised checkpoints: what is read is what the formulas of each format say, number for number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchgen.models import loading
from batchgen.models.quantised.places import get_quantised, widen_all
from batchgen.tensor_parallel import copy_weights, map_model
from tests import tiny_models as models
from tests.models.quantised.checkpoints import CASES, write

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
