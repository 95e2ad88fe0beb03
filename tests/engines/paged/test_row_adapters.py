"""Rows that name one of several adapters: their tokens are those of the model into which peft has merged that one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from batchgen.engine import Setup
from batchgen.engines import parse_options
from batchgen.engines.paged.engine import Paged
from batchgen.types import Generation, Prompt
from batchgen.world import World
from tests import adapters
from tests import tiny_models as models

# Of each base model, the settings of peft's LoraConfig by the adapters' names: other layers, ranks and factors.
KINDS: dict[str, dict[str, adapters.Settings]] = {
    "llama": {
        "sql": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 12},
        "law": adapters.CASES["llama"]["rank-stabilised, of several ranks and alphas"],
        "chat": {"target_modules": ["k_proj", "o_proj", "gate_proj"], "rank_pattern": {"o_proj": 17, "gate_proj": 1}},
    },
    "phi3": {"fused": {"target_modules": "all-linear"}, "one": {"target_modules": ["qkv_proj"], "lora_alpha": 3}},
    "gpt2": {"turned": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}},
    "bloom": {"fused": {"target_modules": ["query_key_value", "dense_4h_to_h"]}},
}
BEGINNING = [models.BEGIN, *range(10, 70)]


class Kind(NamedTuple):
    """A base model, its adapters, and the models into which they are merged."""

    base: Path
    folders: Mapping[str, str]
    merged: Mapping[str, Path]  # the base model by "", too


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    folder = tmp_path_factory.mktemp("adapters")
    base = adapters.save_base(folder / "base", request.param)
    merged = {"": base}
    for name, settings in KINDS[request.param].items():
        adapters.save_adapter(base, folder / name, settings, merged=folder / f"merged-{name}")
        merged[name] = folder / f"merged-{name}"
    return Kind(base, {name: str(folder / name) for name in KINDS[request.param]}, merged)


def load(kind: Kind, *settings: str, batch_size: int | None = None) -> Paged:
    setup = Setup(str(kind.base), "float32", batch_size, World(), adapters=kind.folders)
    return Paged(setup, parse_options(Paged, settings))


def make_prompts(kind: Kind, count: int = 60) -> list[Prompt]:
    """Greedy rows and sampled ones; a quarter or more have no adapter, and a third begin alike, whatever they have."""
    names = ["", *kind.folders]
    made = models.random_prompts(count, longest=90)
    for number, prompt in enumerate(made):
        prompt.adapter = names[number % len(names)]
        if number // len(names) % 3 == 0:
            prompt.tokens = [*BEGINNING, *list(prompt.tokens)[1:20]]
    return made


def generate(engine: Paged, prompts: Sequence[Prompt]) -> dict[str, Generation]:
    generations = [g for batch in engine.generate(iter(prompts), lambda: False) for g in batch.generations]
    assert len(generations) == len(prompts)
    return {generation.id: generation for generation in generations}


def test_the_tokens_are_those_of_the_merged_models(kind: Kind) -> None:
    rows = make_prompts(kind)
    references = {name: models.Model(folder) for name, folder in kind.merged.items()}
    alone = {row.id: references[row.adapter].alone(row) for row in rows}
    of_base = {row.id: references[""].alone(row) for row in rows}
    changed = [row.id for row in rows if row.adapter and alone[row.id] != of_base[row.id]]
    assert len(changed) > len(rows) / 3  # the adapters matter
    for settings, batch_size in (
        ([], None),
        (["step_tokens=17"], 5),
        (["cache_tokens=256", "expected_share=0.05", "step_tokens=64"], 16),
    ):
        with load(kind, *settings, batch_size=batch_size) as engine:
            found = generate(engine, rows)
            assert (engine.preemptions > 0) == (len(settings) == 3)
        for row in rows:
            text = references[row.adapter].tokenizer.decode(alone[row.id])
            assert (found[row.id].text, found[row.id].adapter) == (text, row.adapter), (settings, row.id)
