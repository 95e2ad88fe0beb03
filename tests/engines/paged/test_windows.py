"""Layers with a window give back the pages that it has passed: the tokens are those of `generate` all the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from batchgen.engine import EngineError, Setup
from batchgen.engines.paged.attention import attend
from batchgen.engines.paged.engine import Paged
from batchgen.engines.paged.layer_groups import LayerGroups
from batchgen.engines.paged.layout import AttentionShape, LayerCache, Layout, lay_out
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.runner import Runner
from batchgen.engines.paged.step import StepLimits
from batchgen.models.footprint import LayerCacheShape
from batchgen.types import Generation, Prompt, SamplingParams
from batchgen.world import World
from tests import tiny_models
from tests.engines.paged.families import contract
from tests.engines.paged.families.dense import DENSE
from tests.engines.paged.families.mixtures import MIXTURES

WINDOW = 24
LONGEST = 440  # tokens of a row
CACHE = 272  # tokens: a row of 440 has room only since pages are given back
FAMILIES = {
    "Gemma 3 12B": (1, 5),
    "gpt-oss 20B": (1, 1),
    "Command R7B": (1, 3),
    "Mistral 7B v0.1": (0, 1),
}  # and how many groups without and with a window their layers make


def make_rows() -> list[Prompt]:
    """Of up to 440 tokens, many times the window; a third of them begin alike."""
    source = random.Random(3)
    beginning = [tiny_models.BEGIN, *(source.randrange(4, 260) for _ in range(99))]
    rows = []
    for number in range(12):
        length, new = source.randrange(20, 300), source.randrange(5, 40)
        tokens = [tiny_models.BEGIN, *(source.randrange(4, 260) for _ in range(length))]
        tokens = [*beginning, *tokens[1:]] if number % 3 == 0 else tokens
        rows.append(Prompt(number, f"row-{number}", number + 1, "", tokens, SamplingParams(max_new_tokens=new), {}))
    longest = [tiny_models.BEGIN, *(source.randrange(4, 260) for _ in range(LONGEST - 41))]
    return [*rows, Prompt(12, "row-12", 13, "", longest, SamplingParams(max_new_tokens=40), {})]


def generate(engine: Paged, rows: list[Prompt]) -> dict[str, Generation]:
    return {each.id: each for batch in engine.generate(iter(rows), lambda: False) for each in batch.generations}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_far_beyond_the_window_are_those_of_generate(family: str, tmp_path: Path) -> None:
    settings = (DENSE | MIXTURES)[family] | {"sliding_window": WINDOW}
    path = tiny_models.save(tmp_path, lambda _: contract.build(settings))
    model, rows = tiny_models.Model(path), make_rows()
    alone = {row.id: model.tokenizer.decode(model.alone(row)) for row in rows}
    assert len(set(alone.values())) > len(rows) / 2
    for step_tokens, expected_share in ((64, None), (512, None), (50, 0.05)):
        options = Paged.Options(step_tokens=step_tokens, cache_tokens=CACHE, expected_share=expected_share)
        with Paged(Setup(str(path), "float32", 8, World()), options) as engine:
            generations = generate(engine, rows)
            assert engine._runner is not None
            assert (engine._runner.groups.full, engine._runner.groups.windowed) == FAMILIES[family]
        assert {row.id: generations[row.id].text for row in rows} == alone, step_tokens


@pytest.mark.parametrize("count", [5, 24])
def test_a_layer_that_looks_back_further_than_at_load_is_an_error(count: int) -> None:
    """Pages that it should see may belong to another row by then."""
    shapes = [LayerCacheShape(1, 4, 4)] * 2
    groups = LayerGroups.of(shapes, [0, count], longest=100)
    caches = [LayerCache(torch.zeros(2, 1, PAGE_SIZE, 4), torch.zeros(2, 1, PAGE_SIZE, 4))] * 2
    tables = torch.tensor([[[0, 1], [0, 1]], [[1, 1], [1, 1]]], dtype=torch.int32)
    places = torch.zeros(1, dtype=torch.int32)
    layout = Layout(caches, tables[0], places, places, 1, groups=groups, block_tables=tables)
    token = torch.ones(1, 1, 1, 4)
    with lay_out(layout):
        for layer, window in ((0, 0), (1, count), (1, count - 1)):
            attend(token, token, token, torch.tensor([layer]), AttentionShape(1.0, window))
        for window in (0, count + 1):
            with pytest.raises(EngineError, match=f"layer 1 of this model looks back further than the {count} tokens"):
                attend(token, token, token, torch.tensor([1]), AttentionShape(1.0, window))
    # Each layer has written its own page: those of different groups share a cache, and not a page.
    assert caches[0].keys[:, 0, 0].tolist() == [[1.0] * 4] * 2


def test_windows_are_those_that_the_model_uses_and_not_those_of_its_config() -> None:
    def find_groups(**settings: Any) -> LayerGroups:
        config = Qwen2Config(**tiny_models.SMALL | {"vocab_size": 260, "num_hidden_layers": 4, **settings})
        limits = StepLimits(slots=2, sequence_tokens=200, step_tokens=64)
        return Runner(Qwen2ForCausalLM(config).eval(), limits).groups

    assert find_groups(sliding_window=24, use_sliding_window=True, max_window_layers=1).window == 24
    assert find_groups(sliding_window=24, use_sliding_window=True, max_window_layers=1).windowed == 3
    assert find_groups(sliding_window=24, use_sliding_window=False).windowed == 0
    assert find_groups(sliding_window=200, use_sliding_window=True, max_window_layers=1).windowed == 0
