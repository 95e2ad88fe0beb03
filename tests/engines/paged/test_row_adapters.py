"""Rows that name one of several adapters: their tokens are those of the model into which peft has merged that one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from batchgen.engine import EngineError, Setup
from batchgen.engines import parse_options
from batchgen.engines.paged.adapters import install
from batchgen.engines.paged.alone import Alone
from batchgen.engines.paged.engine import Paged
from batchgen.engines.paged.layout import use_adapter
from batchgen.engines.paged.models import patch
from batchgen.models import ModelError
from batchgen.models.lora import check_adapter, check_row_adapters, read_row_adapters
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Generation, Prompt
from batchgen.world import World
from tests import adapters, kernels
from tests import tiny_models as models
from tests.models.quantised.checkpoints import CASES, write

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
        if number % 7 < 3:
            prompt.params = replace(prompt.params, temperature=0.9, seed=3)
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
    alone = {row.id: references[row.adapter].chosen(row) for row in rows}
    of_base = {row.id: references[""].chosen(row) for row in rows if row.adapter}
    assert sum(alone[id] != tokens for id, tokens in of_base.items()) > len(rows) / 3  # the adapters matter
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


@pytest.mark.parametrize("kind", ["llama", "phi3"], indirect=True)
def test_rows_of_a_quantised_checkpoint_name_adapters(kind: Kind, tmp_path: Path) -> None:
    """What they add lies beside the weights, which are 4 bits here, or the same numbers in 32."""
    write(CASES["compressed int4, rows"], kind.base, tmp_path / "quantised", tmp_path / "plain")
    tokenizer = HfTokenizer(str(tmp_path / "quantised"))
    check_row_adapters(kind.folders, tmp_path / "quantised", tokenizer)
    with pytest.raises(ModelError, match="an adapter is merged into weights that are not"):
        check_adapter(next(iter(kind.folders.values())), tmp_path / "quantised", tokenizer)
    rows, texts = make_prompts(kind, 24), []
    for name in ("quantised", "plain"):
        with load(kind._replace(base=tmp_path / name)) as engine:
            texts.append({id: one.text for id, one in generate(engine, rows).items()})
    assert texts[0] == texts[1]
    assert len(set(texts[0].values())) > 8


def test_layers_with_adapters_compile_whole_and_alike(kind: Kind) -> None:
    names = list(kind.merged)
    references = {name: models.Model(folder).model for name, folder in kind.merged.items()}
    base = models.Model(kind.base).model
    install(base, kind.folders, base.config)
    patched = patch(base, Alone())
    torch.compiler.reset()
    counter = CompileCounter()
    for layer in patched.layers:
        layer.compile(backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for number, length in ((0, 20), (1, 33), (len(names) - 1, 12), (1, 9)):
        ids = torch.randint(4, 128, (length,), generator=torch.Generator().manual_seed(4))
        with torch.inference_mode(), use_adapter(number):
            logits = patched.compute_logits(patched.compute_hidden(ids, torch.arange(length)))
            expected = references[names[number]](ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] == graphs[-1]  # those of the first step serve all the others


def test_the_operator_says_its_shape_to_the_compiler() -> None:
    tensors = [torch.randn(*shape) for shape in ((2, 5, 24), (40, 24), (40,), (3, 16, 24), (3, 40, 16))]
    checks = ("test_schema", "test_faketensor")
    for number in (0, 2):
        with use_adapter(number):
            torch.library.opcheck(torch.ops.batchgen.adapted_product, tuple(tensors), test_utils=checks)


def test_a_layer_that_is_not_called_is_refused(tmp_path: Path) -> None:
    """Bloom adds up slices of the weight by itself, as its training did, and never calls the layer."""
    base = adapters.save_base(tmp_path / "base", "bloom", pretraining_tp=2, slow_but_exact=True)
    adapters.save_adapter(base, tmp_path / "one", {"target_modules": ["dense_4h_to_h"]})
    model = models.Model(base).model
    install(model, {"one": str(tmp_path / "one")}, model.config)
    with pytest.raises(
        EngineError, match=r"a bloom model computes without calling its layer .*\.dense_4h_to_h, so that"
    ):
        patch(model, Alone())


def test_kernels_compute_the_same() -> None:
    kernels.assert_none_wrong("tests.engines.paged.adapter_cases")


REFUSED: list[tuple[str, adapters.Settings, str]] = [
    ("llama", adapters.CASES["llama"]["DoRA"], "changes a weight with a magnitude of its own"),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "changes a whole weight (modules_to_save)"),
    ("llama", {"target_modules": ["embed_tokens"]}, "changes the embedding, by its tensor base_model.model.model.emb"),
    ("llama", {"target_modules": ["lm_head"]}, "changes the output matrix"),
    ("bloom", adapters.CASES["bloom"]["fused, every bias"], "changes a bias"),
    ("bloom", adapters.CASES["bloom"]["products with a bias"], "changes a bias"),
    ("mixtral", adapters.CASES["mixtral"]["experts and router"], "changes the weights of experts (target_parameters)"),
    (
        "mixtral",
        adapters.CASES["mixtral"]["one parameter of the experts"],
        "changes the weights of experts (target_parameters)",
    ),
    ("mixtral", {"target_modules": [], "target_parameters": ["gate.weight"]}, "changes a layer of class Mixtral"),
]


def test_what_a_row_cannot_have_for_itself_is_refused(tmp_path: Path) -> None:
    bases = {name: adapters.save_base(tmp_path / name, name) for name in {base for base, _, _ in REFUSED}}
    for number, (base, settings, sentence) in enumerate(REFUSED):
        folder = adapters.save_adapter(bases[base], tmp_path / str(number), settings)
        with pytest.raises(ModelError) as caught:
            read_row_adapters({"mine": str(folder)}, HfTokenizer(str(bases[base])).config)
        message = str(caught.value)
        assert message.startswith(f"the adapter 'mine' ({folder}) "), message
        assert sentence in message
        assert message.endswith("give its rows a run of their own, in which --adapter FOLDER merges it")
