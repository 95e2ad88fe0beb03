"""The trial of a small model at load finds a wrong feature, and takes rounding for none.

Each case plants one mistake in what our attention or our logits do, for a family that has the feature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from batchgen.engine import EngineError
from batchgen.engines.paged.layout import AttentionShape
from batchgen.engines.paged.models import bloom, coverage, falcon, interface, mpt, patching, structure, trial
from batchgen.models import architectures
from tests.engines.paged.families.contract import make_config
from tests.engines.paged.families.dense import DENSE, LONGROPE
from tests.engines.paged.families.mixtures import MIXTURES
from tests.sweep.kinds import make_config as make_sweep_config

FAMILIES = DENSE | MIXTURES
ROUNDING = trial.TOLERANCE / 10  # the most that a right model may differ by, so that another device may round otherwise
MISTAKE = trial.TOLERANCE * 3  # the least that a wrong one must

Change = Callable[[AttentionShape], AttentionShape]

SHAPES: dict[str, Change] = {
    "scale": lambda shape: shape._replace(scale=shape.scale * 1.01),
    "window": lambda shape: shape._replace(window=shape.window + 1 if shape.window else 0),
    "cap": lambda shape: shape._replace(softcap=0.0),
    "cap by 1 %": lambda shape: shape._replace(softcap=shape.softcap * 1.01),
    "sinks": lambda shape: shape._replace(sinks=None),
    "slopes": lambda shape: shape._replace(slopes=None if shape.slopes is None else shape.slopes * 1.01),
}


def plant_in_attention(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    attend = interface.attend

    def changed(query: Any, key: Any, value: Any, layer: Any, shape: AttentionShape) -> torch.Tensor:
        return attend(query, key, value, layer, change(shape))

    for module in (interface, bloom, falcon, mpt):
        monkeypatch.setattr(module, "attend", changed)


def plant_in_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure.Logits, "__call__", lambda logits, hidden: logits._head(hidden))


def plant_in_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a cached beginning is counted from one position too late."""
    compute = patching.PatchedModel.compute_hidden
    late = trial._STEPS[0][0]

    def changed(patched: patching.PatchedModel, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return compute(patched, ids, torch.where(positions >= late, positions + 1, positions))

    monkeypatch.setattr(patching.PatchedModel, "compute_hidden", changed)


# fmt: off
MISTAKES = {
    "scale": ("Gemma 2 9B", "Granite 3.1 2B", "StableLM 2 12B", "Command R+", "Llama 3.1 8B", "gpt-oss 20B", "MPT 7B",
              "Falcon 40B", "BLOOM 560M", "DeepSeek-V2-Lite", "Phi-2", "OPT 125M"),
    "window": ("Gemma 2 9B", "Gemma 3 12B", "Mistral 7B v0.1", "Phi-3-mini-4k", "Command R7B", "gpt-oss 20B"),
    "cap": ("Gemma 2 9B",),
    "cap by 1 %": ("Gemma 2 9B",),
    "sinks": ("gpt-oss 20B",),
    "slopes": ("BLOOM 560M", "BLOOM 176B", "Falcon RW", "MPT 7B", "MPT 7B storywriter"),
    "logits": ("Gemma 2 9B", "Granite 3.1 2B", "Granite 3.1 1B A400M", "Command R", "Command R+", "Command R7B"),
    "positions": ("Llama 3.1 8B", "Granite 3.1 2B", "Gemma 3 12B", "GPT-2", "OPT 350M", "Falcon 7B", "SmolLM3 3B",
                  "Phi-4-mini", "ERNIE 4.5 0.3B", "DeepSeek-V2-Lite"),
}
# fmt: on


@pytest.mark.parametrize(("mistake", "family"), [(name, one) for name, all_ in MISTAKES.items() for one in all_])
def test_a_planted_mistake_is_found(mistake: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mistake in SHAPES:
        plant_in_attention(monkeypatch, SHAPES[mistake])
    elif mistake == "logits":
        plant_in_logits(monkeypatch)
    else:
        plant_in_positions(monkeypatch)
    config = make_config(FAMILIES[family])
    assert trial.measure_difference(config) >= MISTAKE
    with pytest.raises(
        EngineError, match=r"of type \w+: .* differ by [0-9.]+% of the largest; use --engine accelerate"
    ):
        trial.check(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_is_far_below_the_tolerance(family: str) -> None:
    assert 0 < trial.measure_difference(make_config(FAMILIES[family])) <= ROUNDING


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gemma3n_text", "its last 2 layers attend to keys and values of layers before them"),
        ("gemma4_text", "its heads have 512 numbers, of which the kernels take 256"),
        ("llama4_text", "layers of type chunked_attention, whose state is not kept in pages"),
        ("mamba", "layers of type linear_attention, whose state is not kept in pages"),
        ("rwkv", "it has no attention heads, and keeps a state instead"),
        ("bart", "it is no decoder that Transformers continues texts with"),
        ("musicgen", "it has several parts that take text"),
        ("blt", "its config does not say how many layers it has"),
        ("paligemma", "its tokens attend to those behind them, too"),
    ],
)
def test_what_pages_cannot_hold_is_seen_in_the_config(kind: str, reason: str) -> None:
    with pytest.raises(EngineError, match=f"of type {kind}: .*{reason}.*; use --engine accelerate"):
        coverage.check(make_sweep_config(kind))


def test_stretched_positions_of_a_kind_of_layer_are_refused() -> None:
    """A small model does not reach the context of 8,192 tokens beyond which the longest row of a step decides."""
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    stretched = LONGROPE | {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8192}
    for full, sliding in ((stretched, plain), (plain, stretched)):
        config = make_config(DENSE["Gemma 3 1B"] | {"head_dim": 8})
        coverage.check(config)
        config.rope_parameters = {"full_attention": full, "sliding_attention": sliding}
        with pytest.raises(EngineError, match="positions are of type longrope, which hang on the longest row of a ste"):
            coverage.check(config)


@pytest.mark.parametrize("kind", ["emu3", "qwen2_5_vl"])
def test_a_model_that_sees_is_tried_whole_where_its_text_has_no_class_of_its_own(kind: str) -> None:
    config = make_sweep_config(kind)
    assert architectures.auto_class(config.get_text_config()) is None
    trial.check(config)


def test_an_argument_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family hands something to attention that no family had when this was written."""
    known = interface._attention_interface

    def call(*arguments: Any, **others: Any) -> Any:
        return known(*arguments, **others, bias_of_tomorrow=torch.zeros(1))

    monkeypatch.setitem(interface.ALL_ATTENTION_FUNCTIONS._global_mapping, interface.NAME, call)
    with pytest.raises(EngineError, match="its attention has an argument bias_of_tomorrow that is not known here"):
        trial.check(make_config(FAMILIES["Llama 3.1 8B"]))
