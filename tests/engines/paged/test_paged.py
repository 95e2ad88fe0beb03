"""Engine `paged` on the CPU: the tokens are those of Transformers' own `generate`, one prompt at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from batchgen.engine import EngineError, Setup
from batchgen.engines import parse_options
from batchgen.engines.accelerate import Accelerate
from batchgen.engines.paged.engine import Paged
from batchgen.engines.paged.finished_rows import FinishedRow
from batchgen.engines.paged.launched_step import LaunchedStep
from batchgen.engines.paged.loop import Loop
from batchgen.types import Batch, Generation, Prompt, SamplingParams
from batchgen.world import World
from tests import tiny_models as models
from tests.engines import runs
from tests.engines.paged.families import contract
from tests.engines.paged.families.dense import DENSE, LONGROPE, SMALL
from tests.engines.paged.families.mixtures import MIXTURES

KINDS = {"llama": models.llama, "bloom": models.bloom, "qwen3": models.qwen3, "mistral": models.mistral}
BEGINNING = [models.BEGIN, *range(10, 70)]


def load(model: Path, *settings: str, batch_size: int | None = None, selftest: bool = True) -> Paged:
    setup = Setup(str(model), "float32", batch_size, World(), selftest=selftest)
    return Paged(setup, parse_options(Paged, settings))


def texts(engine: Paged | Accelerate, prompts: Sequence[Prompt]) -> dict[str, Generation]:
    generations = [g for batch in engine.generate(iter(prompts), lambda: False) for g in batch.generations]
    assert len(generations) == len(prompts)
    return {generation.id: generation for generation in generations}


def prompts(count: int = 50) -> list[Prompt]:
    """Of very unequal lengths; a third of them begin alike."""
    made = models.random_prompts(count, longest=90)
    source = random.Random(2)
    for prompt in made[::3]:
        prompt.tokens = [*BEGINNING, *list(prompt.tokens)[1 : source.randrange(2, 20)]]
    return made


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build: Callable[..., PreTrainedModel] = KINDS[request.param]
    return models.save(tmp_path_factory.mktemp("paged") / request.param, build)


def test_the_tokens_are_those_of_generate(kind: Path) -> None:
    rows = prompts()
    model = models.Model(kind)
    alone = {row.id: model.alone(row) for row in rows}
    for settings, batch_size in (
        ([], None),
        (["step_tokens=17"], 5),
        (["cache_tokens=256", "expected_share=0.05", "step_tokens=64"], 16),
    ):
        with load(kind, *settings, batch_size=batch_size) as engine:
            generations = texts(engine, rows)
            # Where all layers have a window, the cache holds five rows, however long they are.
            is_tight = len(settings) == 3 and model.model.config.model_type != "mistral"
            assert (engine.preemptions > 0) == is_tight
        for row in rows:
            assert generations[row.id].generated_tokens == len(alone[row.id])
            assert generations[row.id].text == model.tokenizer.decode(alone[row.id]), (settings, row.id)


def test_rows_that_ask_get_the_logprobs_of_the_model_itself(kind: Path) -> None:
    rows = models.asking_prompts(30)
    model = models.Model(kind)
    with load(kind, "cache_tokens=128", "expected_share=0.05", "step_tokens=50") as engine:
        generations = texts(engine, rows)
        assert (engine.preemptions > 0) == (model.model.config.model_type != "mistral")
    model.check_logprobs(rows, generations)


def test_a_window_that_the_config_names_but_does_not_use_is_none(tmp_path: Path) -> None:
    def build(vocabulary: int) -> PreTrainedModel:
        small = models.SMALL | {"vocab_size": vocabulary, "sliding_window": 4, "use_sliding_window": False}
        return Qwen2ForCausalLM(Qwen2Config(**small))

    path = models.save(tmp_path / "qwen2", build)
    rows = prompts(8)
    model = models.Model(path)
    with load(path) as engine:
        generations = texts(engine, rows)
    assert {row.id: generations[row.id].text for row in rows} == {
        row.id: model.tokenizer.decode(model.alone(row)) for row in rows
    }


@pytest.mark.slow
def test_the_default_model_says_what_it_says_alone(smollm2: Path) -> None:
    questions = ["What is gravity?", "Name three colours.", "Tell me about whales.", "2 + 2 ="] * 3
    model = models.Model(smollm2)
    model.model.float()
    said = [model.tokenizer.chat([{"role": "user", "content": question}]) for question in questions]
    rows = [
        Prompt(n, str(n), n + 1, text, tokens, SamplingParams(max_new_tokens=24 + 3 * n), {})
        for n, (text, tokens) in enumerate(zip(said, model.tokenizer.tokenize(said, special=False), strict=True))
    ]
    with load(smollm2, batch_size=5) as engine:
        generations = texts(engine, rows)
    for row in rows[::3]:
        assert generations[row.id].text == model.tokenizer.decode(model.alone(row))


def test_sampled_rows_and_stop_texts_are_those_of_another_engine(tiny_llama: Path) -> None:
    rows = prompts(40)
    for number, row in enumerate(rows):
        sampling = {"temperature": 0.8, "top_p": 0.9} if number % 3 == 1 else {"temperature": 1.0, "top_k": 20}
        row_sampling = sampling if number % 3 else {}
        stop = ("a", "é") if number % 4 == 0 else ()
        row.params = SamplingParams(max_new_tokens=5 + number, seed=5, stop=stop, **row_sampling)  # type: ignore[arg-type]
    with Accelerate(Setup(str(tiny_llama), "float32", 8, World()), Accelerate.Options()) as other:
        expected = texts(other, rows)
    with load(tiny_llama, "cache_tokens=256", "expected_share=0.05", "step_tokens=50") as engine:
        assert texts(engine, rows) == expected
        assert engine.preemptions > 0
    assert any(generation.finish_reason == "stop" for generation in expected.values())


@pytest.mark.parametrize("setting", ["step_tokens=-1", "cache_tokens=0", "expected_share=nan", "expected_share=0"])
def test_settings_that_nothing_can_run_with_are_sentences(setting: str) -> None:
    with pytest.raises(EngineError, match=f"--set {setting.partition('=')[0]}=.*: must be"):
        parse_options(Paged, [setting])


def test_positions_that_hang_on_the_longest_row_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    path = models.save(tmp_path / "llama", lambda vocabulary: models.llama(vocabulary, rope_parameters=rope))
    with pytest.raises(EngineError, match="rotary positions are of type dynamic, which hang on the longest row"):
        load(path)


ORIGINAL = {"original_max_position_embeddings": 40}
STRETCHED = {
    "phi3": DENSE["Phi-3-mini-128k"] | ORIGINAL,
    "phimoe": MIXTURES["Phi-3.5-MoE"]
    | ORIGINAL
    | {"rope_scaling": LONGROPE | ORIGINAL | {"short_mscale": 1.2, "long_mscale": 1.3}},
    "llama": SMALL
    | {"model_type": "llama", "rope_scaling": LONGROPE | ORIGINAL | {"factor": 4.0}, "max_position_embeddings": 160},
}
"""LongRoPE, with other positions beyond 40 tokens. Rows of the first two that grow beyond them are computed anew with
these by `generate`; those of the third one go on."""


def save_longrope(folder: Path, kind: str) -> Path:
    """A model whose text hangs on its positions."""
    return models.save(folder, lambda _: contract.build(STRETCHED[kind]))


@pytest.mark.parametrize("kind", STRETCHED)
def test_the_self_test_looks_at_a_row_up_to_its_original_context(kind: str, tmp_path: Path) -> None:
    """LongRoPE: behind it, a forward over the whole row has other positions than the row had step by step."""
    path = save_longrope(tmp_path / kind, kind)
    model, rows = models.Model(path), models.random_prompts(12, max_new_tokens=30, longest=40)
    rows = [row for row in rows if len(row.tokens) < 40 < len(row.tokens) + 25 and len(model.alone(row)) > 25]
    assert rows
    for row in rows:
        with load(path, selftest=True) as engine:
            assert texts(engine, [row])[row.id].text == model.tokenizer.decode(model.alone(row))


@pytest.mark.parametrize("kind", STRETCHED)
def test_each_row_has_the_positions_of_its_own_length(kind: str, tmp_path: Path) -> None:
    """LongRoPE: rows that stay within the original context, that cross it, and that begin beyond it, in one batch."""
    path = save_longrope(tmp_path / kind, kind)
    rows = prompts()
    model = models.Model(path)
    alone = {row.id: model.tokenizer.decode(model.alone(row)) for row in rows}
    reach = [len(row.tokens) + len(model.alone(row)) for row in rows]
    assert min(reach) < 40
    assert any(len(row.tokens) < 40 < end for row, end in zip(rows, reach, strict=True))
    with load(path, "cache_tokens=256", "expected_share=0.05", "step_tokens=64") as engine:
        generations = texts(engine, rows)
        assert engine.preemptions > 0
    assert {row.id: generations[row.id].text for row in rows} == alone


def test_a_stop_request_leaves_soon_with_what_has_finished(tiny_llama: Path) -> None:
    rows = models.random_prompts(40, max_new_tokens=400, longest=20)
    rows[7].params = SamplingParams(max_new_tokens=1)
    with load(tiny_llama, selftest=False) as engine:
        batches: list[Batch] = list(engine.generate(iter(rows), lambda: engine.signs.steps > 30))
        finished = [generation.id for batch in batches for generation in batch.generations]
        assert "row-7" in finished
        assert len(finished) < 20
        assert engine.signs.steps < 300


def test_tokens_and_steps_are_counted(tiny_llama: Path) -> None:
    rows = prompts(10)
    with load(tiny_llama) as engine:
        generations = texts(engine, rows)
        # A row's end is seen a step late, and the token of that step counts for nothing.
        wanted = sum(generation.generated_tokens for generation in generations.values())
        assert engine.signs.generated_tokens == wanted
        assert 0 < engine.signs.steps < wanted


def test_a_model_that_is_not_covered_is_refused_by_name(tmp_path: Path) -> None:
    def build(vocabulary: int) -> PreTrainedModel:
        return GPTJForCausalLM(GPTJConfig(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=2, rotary_dim=8))

    path = models.save(tmp_path / "gptj", build)
    with pytest.raises(EngineError, match=r"of type gptj: its attention does not ask .*; use --engine accelerate"):
        load(path)
    assert not Paged.placements(models.Model(path).tokenizer.config, None, 1)


def test_batch_size_is_the_most_at_once(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    read = Loop._read

    def counted(loop: Loop, launched: LaunchedStep) -> list[FinishedRow]:
        sizes.append(len(launched.step.rows))
        return read(loop, launched)

    monkeypatch.setattr(Loop, "_read", counted)
    with load(tiny_llama, batch_size=3) as engine:
        texts(engine, prompts(20))
    assert max(sizes) == 3


@pytest.mark.slow
def test_a_killed_run_goes_on_with_other_ranks_and_gives_the_same_text(tiny_llama: Path, tmp_path: Path) -> None:
    rows = runs.rows(tmp_path / "prompts.jsonl", 60)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = ["--temperature", "0.7", "--logprobs"]
    assert runs.run(*runs.command(rows, whole, tiny_llama, *words, engine="paged")).returncode == 0
    kill = {"BATCHGEN_TEST_KILL": "1"}
    first = runs.run(
        *runs.command(rows, broken, tiny_llama, *words, "--batch-size", "2", engine="paged"),
        environment={**kill, "PYTHONPATH": str(killing_after(tmp_path, steps=60))},
    )
    assert first.returncode == -9
    resumed = runs.run(*runs.command(rows, broken, tiny_llama, *words, "--ranks", "2", engine="paged"))
    assert resumed.returncode == 0, resumed.stderr
    assert runs.texts(broken) == runs.texts(whole)
    for row, other in zip(runs.read(broken), runs.read(whole), strict=True):
        assert len(row["logprobs"]) == row["generated_tokens"]
        assert row["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)
    assert json.loads((broken / "attempts" / "00002.json").read_text())["engine"] == "paged"


def killing_after(folder: Path, steps: int) -> Path:
    """A folder for PYTHONPATH: the process dies as by kill -9 at that step."""
    made = folder / "site"
    made.mkdir()
    (made / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if os.environ.get('BATCHGEN_TEST_KILL'):\n"
        "    import batchgen.engines.paged.loop as loop\n"
        "    read, count = loop.Loop._read, [0]\n"
        "    def dying(self, launched):\n"
        "        count[0] += 1\n"
        f"        if count[0] > {steps}:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return read(self, launched)\n"
        "    loop.Loop._read = dying\n"
    )
    return made
