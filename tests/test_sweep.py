"""Models of different character through engine `accelerate`; scripts/sweep takes every kind through every engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from batchgen.engine import SignsOfLife
from batchgen.generation.greedy import LoadedModel
from batchgen.generation.sizing import BatchSizing
from batchgen.generation.static_batches import StaticBatches
from batchgen.models import architectures, loading
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Generation
from tests.sweep.compare import ENGINES, Outcome, alone, judge, rows, save_tokenizer, sweep
from tests.sweep.kinds import ALL, CAUSAL, SEEING, build

KINDS = (
    "bloom",  # biases by distance in place of positions
    "gpt2",  # learned positions
    "bart",  # learned positions that it counts by itself, padding too
    "roberta",  # a forward over the whole row counts other positions than `generate` does
    "gemma3_text",  # windows and whole attention in turn
    "gemma4_text",  # sizes that differ by layer
    "qwen3_moe",  # experts
    "mamba",  # a state in place of attention
    "granitemoehybrid",  # both
    "rwkv",  # a state that takes in what a row is padded with
    "mistral3",  # sees
    "paligemma",  # sees, and looks at its prompt in both directions
    "qwen2_5_vl",  # sees, and has positions in time, height and width
)

PAGED = {"bloom", "gpt2", "gemma3_text", "qwen3_moe", "mistral3", "qwen2_5_vl"}  # those that `paged` covers

# Of these the rows of one prompt share its prefill, but of the last two, which hold states elsewhere than in a cache of
# Transformers' own.
SHARING = (
    "bart",  # a cache of the encoder, too
    "gemma3",  # windows and whole attention in turn, and pictures that are not there
    "glm_moe_dsa",  # an index of its keys
    "inkling_text",  # states and windows in one layer
    "jamba",  # states and attention in turn
    "lfm2",  # states of convolutions alone
    "qwen2_5_vl",  # positions in time, height and width
    "deepseek_v4",
    "recurrent_gemma",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads are slower than one where products are this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_in_a_batch_is_what_it_is_alone(kind: str, tmp_path: Path) -> None:
    swept = sweep(kind, ["accelerate"], tmp_path)
    assert (swept.impossible, swept.outcomes) == ("", {"accelerate": Outcome("equal")})
    assert swept.varies
    assert swept.chosen == ("paged" if kind in PAGED else "accelerate")


@pytest.mark.parametrize("kind", SHARING)
def test_rows_of_one_prompt_are_what_one_is_alone(kind: str, tmp_path: Path) -> None:
    model = build(kind, 0)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    tokenizer = HfTokenizer(str(tmp_path))
    expected = alone(model, rows()[:3], tokenizer)
    loaded = LoadedModel(loading.load(str(tmp_path), {"dtype": torch.float32}), tokenizer, torch.device("cpu"))
    embedded: list[int] = []
    loaded.model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: embedded.append(len(ids[0])))
    prompts = iter([replace(prompt, sample=sample) for prompt in rows()[:3] for sample in range(3)])
    batches = list(StaticBatches(loaded, BatchSizing(9), SignsOfLife()).run(prompts, lambda: False))
    found = [one for batch in batches for one in batch.generations]
    for sample in range(3):
        assert judge(expected, {one.id: one for one in found if one.sample == sample}) == Outcome("equal")
    assert len(batches[0].generations) == embedded[0] * (1 if kind in SHARING[-2:] else 3)


@pytest.mark.slow
def test_a_model_that_sees_runs_with_every_engine(tmp_path: Path) -> None:
    swept = sweep("idefics3", ENGINES, tmp_path)
    assert swept.impossible == ""
    assert {name: outcome.word for name, outcome in swept.outcomes.items()} == dict.fromkeys(ENGINES, "equal")


def test_a_model_that_paged_does_not_cover_is_refused_by_it(tmp_path: Path) -> None:
    outcome = sweep("paligemma", ["paged"], tmp_path).outcomes["paged"]
    assert outcome.word == "refused"
    assert "does not cover this model, of type paligemma: its tokens attend to those behind them" in outcome.detail


@pytest.mark.parametrize("kind", ["bart", "rwkv"])
def test_padding_that_changes_a_row_is_found(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_UNPADDED", frozenset())
    swept = sweep(kind, ["accelerate"], tmp_path)
    assert list(swept.outcomes) == ["accelerate"], swept.impossible
    outcome = swept.outcomes["accelerate"]
    assert outcome.word == "refused"
    assert outcome.detail.startswith("self-test: ")


@pytest.mark.parametrize("kind", ["blip", "idefics", "reformer", "janus"])
def test_a_kind_that_does_not_continue_texts_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    swept = sweep(kind, ["accelerate"], tmp_path)
    assert list(swept.outcomes) == ["accelerate"], swept.impossible
    outcome = swept.outcomes["accelerate"]
    assert outcome.word == "refused"
    assert f"models of type {kind}" in outcome.detail


def test_another_text_differs() -> None:
    one = Generation(0, "a", "text", "stop", 3, 5, None, {})
    assert judge({"a": one}, {"a": one}).word == "equal"
    for changed in ({"text": "test"}, {"generated_tokens": 6}, {"finish_reason": "length"}):
        other = Generation(**{**{name: getattr(one, name) for name in Generation.__slots__}, **changed})
        assert judge({"a": one}, {"a": other}).word == "differs"
    assert judge({"a": one}, {}).word == "differs"


def test_what_is_refused_or_not_padded_is_a_kind_that_transformers_has() -> None:
    missing = (set(architectures._UNPADDED) | set(architectures._REFUSED) | architectures._STATE_OUTSIDE_CACHE) - set(
        ALL
    )
    newer = {"unlimited_ocr"} if Version(transformers.__version__) < Version("5.23") else set()
    assert missing <= newer
    assert {*KINDS, *SHARING} <= set(CAUSAL) | set(SEEING)
