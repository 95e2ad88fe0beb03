"""What is compiled beside the loading of weights is what the loaded model needs, and nothing of it stays behind."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from batchgen.engines.paged import warm_up
from batchgen.engines.paged.forward import Forward
from batchgen.engines.paged.models import small_config
from batchgen.engines.paged.models.structure import find_body, find_layers
from batchgen.engines.paged.step import StepLimits
from batchgen.models import loading
from batchgen.models.definition.build import build_empty
from tests.engines.paged.families.contract import make_config
from tests.engines.paged.families.dense import DENSE
from tests.engines.paged.families.mixtures import MIXTURES

FAMILIES = DENSE | MIXTURES
LIMITS = StepLimits(slots=8, sequence_tokens=512, step_tokens=192)

# Kinds of layers in each model: each is compiled once.
COMPILED = {"OLMo 2 7B": 1, "Qwen3 30B A3B": 1, "gpt-oss 20B": 2, "Gemma 3 1B": 2, "DeepSeek-V2-Lite": 2}


def choose_limits(_parameters: int, _free: int) -> StepLimits:
    return LIMITS


def subject(config: Any, **others: Any) -> warm_up.Subject:
    given = {"choose_limits": choose_limits, "compiler": "eager"} | others
    return warm_up.Subject(config, torch.bfloat16, torch.device("cpu"), **given)


def save(folder: Path, family: str) -> Any:
    """A model of this family in `folder`; its config."""
    model = AutoModelForCausalLM.from_config(make_config(FAMILIES[family]), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder)


def load(folder: Path) -> Any:
    return loading.load(str(folder), {"dtype": torch.bfloat16})


def count_graphs() -> int:
    return counters["stats"].get("unique_graphs", 0)


@pytest.fixture(autouse=True)
def _new_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("family", COMPILED)
def test_the_loaded_model_finds_its_layers_compiled(tmp_path: Path, family: str) -> None:
    config = save(tmp_path, family)
    random_state = torch.get_rng_state()
    call = torch.nn.Module.__call__
    with warm_up.compile_meanwhile(subject(config)):
        model = load(tmp_path)
    assert count_graphs() == COMPILED[family]
    assert torch.get_rng_state().equal(random_state)
    assert torch.get_default_dtype() == torch.float32
    assert torch.nn.Module.__call__ is call
    forward = Forward(model, LIMITS, compiler="eager")
    forward.allocate(2)
    with torch.inference_mode():
        for tokens in (99, 192, 7):
            forward.rehearse(tokens)
        forward.rehearse_decoding(8)
        forward.compute_alone(torch.zeros((1, 23), dtype=torch.long), 5)  # as the self-test does
    assert count_graphs() == COMPILED[family]


def test_the_compiler_waits_for_the_modules_of_the_loaded_model(tiny_llama: Path) -> None:
    with warm_up.compile_meanwhile(subject(AutoConfig.from_pretrained(tiny_llama))):
        pass  # nothing is loaded
    assert count_graphs() == 0


def list_models() -> list[Any]:
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is LlamaForCausalLM]


def fail(*_: int) -> StepLimits:
    raise RuntimeError("planted")


FAILURES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "before the model is there": {"choose_limits": fail},
    "in the compiler": {"compiler": "a backend that nobody has"},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_whatever_fails_a_model_is_loaded_and_nothing_is_left_behind(tiny_llama: Path, failure: str) -> None:
    threads = threading.active_count()
    config = AutoConfig.from_pretrained(tiny_llama)
    with warm_up.compile_meanwhile(subject(config, **FAILURES[failure])):
        model = load(tiny_llama)
    assert threading.active_count() == threads
    assert [each is model for each in list_models()] == [True]
    assert count_graphs() == (failure == "nothing")
    assert model.lm_head.weight.isfinite().all()


def test_an_error_inside_leaves_as_it_is_and_compiles_nothing(tiny_llama: Path) -> None:
    threads = threading.active_count()
    config = AutoConfig.from_pretrained(tiny_llama)
    with pytest.raises(KeyError, match="planted"), warm_up.compile_meanwhile(subject(config)):
        raise KeyError("planted")
    assert threading.active_count() == threads
    assert count_graphs() == 0


def test_without_room_beside_the_weights_there_is_no_warm_up(tiny_llama: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llama)
    whole = warm_up._estimate_parameters(config, build_empty(config)) * 2
    chosen: list[int] = []

    def choose(parameters: int, free: int) -> StepLimits:
        chosen.append(parameters)
        return fail(free)

    for width in (10**12, config.intermediate_size):
        config.intermediate_size = width
        with warm_up.compile_meanwhile(subject(config, choose_limits=choose)):
            pass
    assert [parameters * 2 for parameters in chosen] == [whole]


def list_shapes(model: Any) -> list[dict[str, torch.Size]]:
    layers = find_layers(find_body(model), model.config.get_text_config().num_hidden_layers)
    return [{name: parameter.shape for name, parameter in layer.named_parameters()} for layer in layers]


def list_kinds(config: Any) -> list[list[Any]]:
    """The lists that a config has for its layers: an entry a layer each."""
    text = config.get_text_config()
    layers = text.num_hidden_layers
    lists = [getattr(text, "layer_types", None), getattr(text, "mlp_layer_types", None)]
    return [list(each or [""] * layers) for each in lists]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_of_zeros_has_the_first_layers_of_the_whole_one_and_all_kinds(family: str) -> None:
    config = make_config(FAMILIES[family])
    whole, few = build_empty(config, torch.bfloat16), warm_up._build_empty(config, torch.bfloat16)
    all_layers, first_layers = list_shapes(whole), list_shapes(few)
    assert first_layers == all_layers[: len(first_layers)]
    assert all(layer in first_layers for layer in all_layers)
    kinds, few_kinds = (set(zip(*list_kinds(model.config), strict=True)) for model in (whole, few))
    assert few_kinds == kinds
    assert few.get_output_embeddings().weight.shape == whole.get_output_embeddings().weight.shape
    total = sum(parameter.numel() for parameter in whole.parameters())
    assert total <= warm_up._estimate_parameters(config, few) <= 1.6 * total


def test_what_is_cut_for_a_trial_is_cut_further_than_for_a_warm_up() -> None:
    config = make_config(FAMILIES["gpt-oss 20B"])
    few = small_config.cut_layers(config)
    assert few.hidden_size == config.hidden_size
    assert few.layer_types == ["sliding_attention", "full_attention"]
    assert few.vocab_size == config.vocab_size
    assert few.sliding_window == config.sliding_window
