"""SmolLM2 in the formats of others: it still writes what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchgen.models import loading
from batchgen.models.tokenizer import HfTokenizer
from tests.kernels import ROOT
from tests.models.quantised.checkpoints import CASES, write

pytestmark = pytest.mark.slow

LOSSES = {"fp8 blocks": 0.03, "awq": 0.35, "gptq": 0.35}


@pytest.fixture(scope="module")
def expected(smollm2: Path) -> float:
    return measure(smollm2)


@pytest.mark.parametrize("name", LOSSES)
def test_a_text_is_nearly_as_likely(name: str, smollm2: Path, expected: float, tmp_path: Path) -> None:
    write(CASES[name], smollm2, tmp_path / "quantised", tmp_path / "plain", rounds=True)
    difference = measure(tmp_path / "quantised") - expected
    assert difference < LOSSES[name], f"{difference:.3f} nats a token more than {expected:.3f}"


def measure(folder: Path) -> float:
    """The mean surprise of a text that is known to be English, in nats a token."""
    model = loading.load(str(folder), {"dtype": torch.float32})
    text = (ROOT / "docs" / "determinism.md").read_text(encoding="utf-8")[:1500]
    ids = torch.tensor(HfTokenizer(str(folder)).tokenize([text], special=True))
    with torch.inference_mode():
        loss: torch.Tensor = model(ids, labels=ids).loss
    return float(loss)
