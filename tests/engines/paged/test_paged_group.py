"""Engine `paged` over ranks that share a model: the text of one process, by whichever rank is lost or late."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from batchgen import tensor_parallel
from batchgen.engine import EngineError, Setup, Stream
from batchgen.engines import find, parse_options
from batchgen.engines.paged.alone import Alone
from batchgen.engines.paged.models import patch
from batchgen.tensor_parallel import process_group
from batchgen.world import World
from tests import tiny_models as models
from tests.engines import engine_rank
from tests.engines.ds_zero import zero_matrix
from tests.engines.paged.test_paged import load
from tests.engines.paged.test_paged import texts as say
from tests.engines.runs import altered, command, ended_by, read, rows, run, texts, texts_alone
from tests.generation import parameter_cases
from tests.tensor_parallel import test_texts


def build_with_windows(vocabulary: int) -> PreTrainedModel:
    """A layer that sees all, and three that look back at 24 tokens: four groups of layers, each with its own pages."""
    windows = {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 4}
    return Qwen2ForCausalLM(Qwen2Config(**models.SMALL | {"vocab_size": vocabulary} | windows))


KINDS = {
    "llama": partial(models.llama, num_key_value_heads=4),
    "bloom": models.bloom,
    "qwen3": models.qwen3,
    "mistral": models.mistral,
    "windows": build_with_windows,
}
# A cache so small that rows are preempted, and steps so small that prompts are computed in chunks.
TIGHT = ("tp=2", "cache_tokens=256", "expected_share=0.05", "step_tokens=16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    scratch = tmp_path_factory.mktemp("models")
    return {name: models.save(scratch / name, build) for name, build in KINDS.items()}


@pytest.fixture(scope="module")
def over_two(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks generate with each model."""
    results = tmp_path_factory.mktemp("ranks") / "two"
    engine_rank.ranks(2, list(folders.values()), TIGHT, results, (30, engine_rank.CASES), engine="paged")
    return results


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_model_over_two_ranks_says_what_it_says_alone(
    kind: str, folders: dict[str, Path], over_two: Path
) -> None:
    expected = zero_matrix.alone(folders[kind], engine_rank.prompts(30))
    results = engine_rank.texts(over_two / kind)
    assert results[30] == {index: one.text for index, one in expected.items()}
    zero_matrix.check_logprobs(engine_rank.logprobs(over_two / kind)[30], expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_over_two_ranks_each_parameter_does_what_its_definition_says(
    kind: str, folders: dict[str, Path], over_two: Path
) -> None:
    model = models.Model(folders[kind])
    reference = parameter_cases.Reference(model)
    found = engine_rank.texts(over_two / kind)[engine_rank.CASES]
    assert found == {row.index: str(reference.tokens(row)) for row in engine_rank.cases()}
    logprobs = engine_rank.logprobs(over_two / kind)[engine_rank.CASES]
    asking = [row for row in engine_rank.cases() if row.params.prompt_logprobs]
    assert logprobs.keys() == {row.index for row in asking}
    for row in asking:
        expected = model.logprobs(replace(row, tokens=row.tokens[:1]), row.tokens[1:])
        assert logprobs[row.index] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_each_rank_rounds_its_heads_of_the_cache_as_one_process_does(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = [*TIGHT, "kv_dtype=fp8"]
    results = engine_rank.ranks(2, folders["llama"], settings, tmp_path / "ranks", (20,), engine="paged")
    prompts = engine_rank.prompts(20)
    with load(folders["llama"], "kv_dtype=fp8") as engine:
        expected = {generation.index: generation.text for generation in say(engine, prompts).values()}
    assert results[20] == expected
    plain = zero_matrix.alone(folders["llama"], prompts)
    assert sum(expected[index] != one.text for index, one in plain.items()) > 5  # or this test shows nothing


@pytest.mark.slow
def test_groups_are_streams_of_their_own(folders: dict[str, Path], tmp_path: Path) -> None:
    results = engine_rank.ranks(4, folders["llama"], ["tp=2"], tmp_path / "ranks", (1, 20), engine="paged")
    for count in (1, 20):  # of one prompt, the second group has none
        expected = zero_matrix.alone(folders["llama"], engine_rank.prompts(count))
        assert results[count] == {index: one.text for index, one in expected.items()}


@pytest.mark.slow
def test_a_killed_rank_ends_its_group_and_a_whole_model_goes_on(folders: dict[str, Path], tmp_path: Path) -> None:
    model, out, whole = folders["llama"], tmp_path / "out", tmp_path / "whole"
    prompts = rows(tmp_path / "p.jsonl", 36, bad=(5, 7))
    words = command(prompts, out, model, "--heartbeat-seconds", "0.1", "--temperature", "0.7", engine="paged")
    assert "rank 1 died" in ended_by(signal.SIGKILL, [*words, "--tp", "2", "--batch-size", "2"], out)
    # A stop that reaches one rank alone, which plans nothing.
    ended_by(signal.SIGUSR2, [*words, "--tp", "2", "--batch-size", "1"], out, 10, attempt=2)
    ends = [json.loads(path.read_bytes()) for path in sorted(out.glob("attempts/00002-*.json"))]
    assert ends[1]["state"] == "stopped"
    assert {end["state"] for end in ends} <= {"stopped", "finished"}
    assert ends[0]["steps"] == ends[1]["steps"], "what one has told, the other has done"
    assert run(*words).returncode == 3  # a rank alone; two rows are bad
    done = run(*command(prompts, whole, model, "--temperature", "0.7", engine="accelerate"))
    assert done.returncode == 3, done.stderr
    assert texts(out) == texts(whole)


# For sitecustomize: rank 1 is stopped while it loads, as by a disk that is gone.
FROZEN_LOADING = """
import os
if os.environ.get("RANK") == "1":
    import signal
    from batchgen.tensor_parallel import shard
    shard.copy_weights = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.slow
def test_a_rank_that_freezes_while_it_loads_is_found(folders: dict[str, Path], tmp_path: Path) -> None:
    prompts, out = rows(tmp_path / "p.jsonl", 6), tmp_path / "out"
    words = command(prompts, out, folders["llama"], "--heartbeat-seconds", "0.2", "--tp", "2", engine="paged")
    ended = run(*words, "--set", "timeout_seconds=3", environment=altered(tmp_path, FROZEN_LOADING))
    assert ended.returncode == 75, ended.stderr
    assert "no step for 3 s: rank 1 (process" in ended.stderr


# For sitecustomize: on rank 0, a step finds no memory beside a cache of more than 110 pages.
NO_MEMORY = """
import os
if os.environ.get("RANK") == "0":
    import torch
    from batchgen.engines.paged import runner
    launch = runner.Runner.launch
    def small(self, step):
        if self.pages > 110 and step.decoding:
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        return launch(self, step)
    runner.Runner.launch = small
"""

# On rank 1, the look at the first rows finds none, once.
NO_MEMORY_TO_LOOK = """
import os
if os.environ.get("RANK") == "1":
    import torch
    from batchgen.generation import selftest
    logits_of, looked = selftest.logits_of, os.environ["LOOKED"]
    def small(*arguments, **options):
        if not os.path.exists(looked):
            open(looked, "w").close()
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        return logits_of(*arguments, **options)
    selftest.logits_of = small
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", [NO_MEMORY, NO_MEMORY_TO_LOOK], ids=["in a step", "in the self-test"])
def test_out_of_memory_of_one_rank_starts_the_group_again_with_a_smaller_cache(
    fault: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    prompts, out = rows(tmp_path / "p.jsonl", 30), tmp_path / "out"
    words = command(prompts, out, folders["llama"], "--set", "cache_tokens=2000", "--tp", "2", engine="paged")
    done = run(*words, environment=altered(tmp_path, fault, LOOKED=str(tmp_path / "looked")))
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("attempts/?????.json"))) == 2, done.stderr
    assert len(read(out)) == 30
    assert texts(out) == texts_alone(prompts, folders["llama"], tmp_path / "one")


# For sitecustomize: rank 1 loads five seconds longer, and rank 0 never comes back from its first commit.
LATE = """
import os
if os.environ.get("RANK") == "1":
    import time
    from batchgen.tensor_parallel import shard
    copy_weights = shard.copy_weights
    def slowly(*arguments, **options):
        time.sleep(5)
        return copy_weights(*arguments, **options)
    shard.copy_weights = slowly
if os.environ.get("RANK") == "0":
    import time
    from batchgen.checkpoint import Writer
    Writer.commit = lambda *arguments: time.sleep(300)
"""


@pytest.mark.slow
def test_loading_may_take_longer_than_patience_and_a_first_rank_that_hangs_is_found(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    prompts, out = rows(tmp_path / "p.jsonl", 20), tmp_path / "out"
    words = command(prompts, out, folders["llama"], "--tp", "2", "--set", "timeout_seconds=2", engine="paged")
    words += ["--stall-seconds", "5", "--heartbeat-seconds", "0.2"]
    ended = run(*words, environment=altered(tmp_path, LATE))
    assert ended.returncode == 75, ended.stderr
    # The two tell each other that they are there, so the patience of neither has come to its end.
    assert "no step for 5 s: " in ended.stderr
    assert "no step for 2 s" not in ended.stderr
    assert "in _commit" in (out / "attempts" / "00001-stacks-00000.txt").read_text()


@pytest.mark.parametrize("name", ["deepseek_v2", "gpt_oss", "mixtral", "olmo2", "phi3", "qwen3_moe"])
def test_the_layers_of_a_share_are_compiled_as_a_whole_for_any_length(name: str, tmp_path: Path) -> None:
    torch.compiler.reset()  # what tests before have compiled counts against the limit of variants
    folder = models.save(tmp_path / "model", partial(test_texts.build, name=name))
    ids = torch.randint(4, 200, (30,))
    with process_group.fake_group(1, 2), torch.inference_mode():
        group = torch.distributed.group.WORLD
        assert group is not None
        shard = tensor_parallel.map_model(str(folder), None)
        tensor_parallel.split(shard, group)
        tensor_parallel.copy_weights(shard, str(folder), ids.device, torch.float32)
        tensor_parallel.use_plain_layers(shard, group)
        patched = patch(shard, Alone())
        expected = patched.compute_hidden(ids, torch.arange(30))
        for layer in patched.layers:  # what compiles here has no break in its graph
            layer.compile(dynamic=True, fullgraph=True, backend="eager")
        assert torch.allclose(patched.compute_hidden(ids, torch.arange(30)), expected, atol=1e-5)
        with torch.compiler.set_stance("fail_on_recompile"):
            patched.compute_hidden(ids[:17], torch.arange(17))


def test_a_type_it_does_not_have_is_refused_before_anything_is_loaded(folders: dict[str, Path]) -> None:
    paged = find("paged")
    setup = Setup(str(folders["llama"]), "nf4", None, World(0, 0, 2, 2))
    with pytest.raises(EngineError, match="no dtype nf4"):
        paged(setup, parse_options(paged, ["tp=2"]))


def test_groups_are_streams_whose_first_ranks_write() -> None:
    paged = find("paged")
    streams = [paged.stream(World(rank, rank, 4, 4), parse_options(paged, ["tp=2"])) for rank in range(4)]
    assert streams == [Stream(0, 2, True), Stream(0, 2, False), Stream(1, 2, True), Stream(1, 2, False)]
    assert paged.stream(World(1, 1, 2, 2), parse_options(paged, [])) == Stream(1, 2, True)


def test_heads_that_do_not_divide_are_a_sentence(folders: dict[str, Path]) -> None:
    paged = find("paged")
    setup = Setup(str(folders["llama"]), "float32", None, World(0, 0, 3, 3))
    with pytest.raises(EngineError, match="takes as many as the others: tp can be 1, 2, 4"):
        paged(setup, parse_options(paged, ["tp=3"]))
