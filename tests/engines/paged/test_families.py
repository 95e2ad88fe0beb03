"""One family of each kind of feature keeps the contract of `families.contract`; `scripts/families` has all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engines.paged.families import contract
from tests.engines.paged.families.dense import DENSE, Config
from tests.engines.paged.families.mixtures import MIXTURES, REFUSED

# Windows are cut to this, so that short rows reach beyond them; with its own, a family is in `scripts/families`.
WINDOW = 70

# fmt: off
FEATURES = {
    "plain": "Llama 3.1 8B",
    "biases of positions": "MPT 7B storywriter",
    "caps": "Gemma 2 9B",
    "two kinds of rotary positions": "Gemma 3 12B",
    "layers without positions": "Command R7B",
    "scaled logits": "Granite 3.1 8B",
    "fused projections": "Phi-3-mini-4k",
    "learned positions": "OPT 350M",
    "one key head": "Falcon 7B",
    "experts": "Qwen3 30B A3B",
    "sinks, and experts that are transposed": "gpt-oss 20B",
    "keys and values of different sizes": "DeepSeek-V2-Lite",
}
# fmt: on


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads are slower than one where products are this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cut_window(settings: Config) -> Config:
    has_window = contract.find_window(contract.make_config(settings)) > 0
    return settings | {"sliding_window": WINDOW} if has_window else settings


@pytest.mark.parametrize("feature", FEATURES)
def test_sixty_rows_are_those_of_transformers(feature: str, tmp_path: Path) -> None:
    settings = cut_window((DENSE | MIXTURES)[FEATURES[feature]])
    outcome = contract.check(settings, tmp_path, count=30, step=6)
    assert not outcome.wrong
    assert outcome.is_kept, outcome


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused(name: str) -> None:
    settings, reason = REFUSED[name]
    assert reason in contract.find_refusal(settings)


def test_every_family_of_the_table_is_covered() -> None:
    refused = {name: contract.find_refusal(settings) for name, settings in (DENSE | MIXTURES).items()}
    assert {name: why for name, why in refused.items() if why} == {}
