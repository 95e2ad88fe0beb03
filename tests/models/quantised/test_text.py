"""Engines on quantised checkpoints: the text is that of the same model with the widened weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from batchgen.engine import Engine, Setup
from batchgen.engines import parse_options
from batchgen.engines.accelerate import Accelerate
from batchgen.engines.paged.engine import Paged
from batchgen.world import World
from tests import tiny_models as models
from tests.models.quantised.checkpoints import CASES, MXFP4, add_cache_scales, write
from tests.models.quantised.test_checkpoint import FAMILIES, SIZES

MODELS: dict[str, tuple[str, Callable[..., PreTrainedModel]]] = {
    "partial blocks": ("fp8 blocks", lambda vocabulary: models.llama(vocabulary, **SIZES)),
    "rows": ("compressed fp8 weights", lambda vocabulary: models.llama(vocabulary, **SIZES)),
    "act order": ("gptq by act", lambda vocabulary: models.llama(vocabulary, **SIZES)),
    "fused": FAMILIES["fused"],
    "experts": FAMILIES["experts in int4"],
    "gpt-oss": FAMILIES["gpt-oss"],
}


@pytest.fixture(scope="module", params=MODELS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A quantised checkpoint, and the same numbers in float32."""
    name, build = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    base = models.save(folder / "base", build)
    write(CASES.get(name, MXFP4), base, folder / "quantised", folder / "plain")
    if request.param == "rows":
        add_cache_scales(folder / "quantised")
    return folder / "quantised", folder / "plain"


@pytest.mark.parametrize("engine", [Paged, Accelerate])
def test_the_text_is_that_of_the_widened_weights(engine: type[Engine], folders: tuple[Path, Path]) -> None:
    quantised, plain = folders
    if engine is Paged and "activation_scheme" in (quantised / "config.json").read_text():
        pytest.skip("its inputs are rounded, too")
    prompts = models.random_prompts(6, longest=40)
    loaded = engine(Setup(str(quantised), "float32", None, World()), parse_options(engine, ()))
    try:
        batches = list(loaded.generate(iter(prompts), lambda: False))
    finally:
        loaded.close()
    found = {generation.id: generation.text for batch in batches for generation in batch.generations}
    expected = models.Model(plain).texts(prompts)
    if engine is Paged and "blocks" in quantised.parent.name:  # it rounds inputs, too, so that a text soon differs
        alike = [found[key][:1] == generation.text[:1] for key, generation in expected.items()]
        assert sum(alike) >= len(alike) / 2
        return
    assert found == {key: generation.text for key, generation in expected.items()}
    assert len(set(found.values())) > 1
