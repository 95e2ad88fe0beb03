"""One family of each kind of feature keeps the contract of `families.contract`; `scripts/families` has all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engines.paged.families import __main__ as script
from tests.engines.paged.families import contract, rounded
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


@pytest.mark.parametrize("feature", ["plain", "sinks, and experts that are transposed"])
def test_rounded_logprobs_are_as_good_as_those_of_transformers(feature: str, tmp_path: Path) -> None:
    outcome = rounded.check(cut_window((DENSE | MIXTURES)[FEATURES[feature]]), tmp_path)
    assert outcome.is_kept, outcome


def test_a_window_that_is_off_by_one_is_more_than_rounding(tmp_path: Path) -> None:
    settings = cut_window(DENSE["Mistral 7B v0.1"])
    outcome = rounded.check(settings, tmp_path, planted={"sliding_window": WINDOW - 1})
    assert not outcome.is_kept, outcome


def test_a_part_of_the_table_is_every_second_family(capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in script.FAMILIES if "OPT" in name]
    assert len(names) == 2
    for part, name in enumerate(names, 1):
        assert script.main(["--rounded", "--count", "4", "--part", f"{part}/2", "OPT"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"| {name} |")
        assert lines[1:] == ["1 families, 0 wrong"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused(name: str) -> None:
    settings, reason = REFUSED[name]
    assert reason in contract.find_refusal(settings)


def test_every_family_of_the_table_is_covered() -> None:
    refused = {name: contract.find_refusal(settings) for name, settings in (DENSE | MIXTURES).items()}
    assert {name: why for name, why in refused.items() if why} == {}
