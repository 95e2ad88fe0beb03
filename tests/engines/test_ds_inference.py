"""Tensor parallelism on CPU ranks: the text of one process, over any number of ranks; nobody hangs, nothing is lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from batchgen.engine import EngineError, Setup, Stream
from batchgen.engines import find, parse_options
from batchgen.models import cache_folder, prepare_default
from batchgen.types import UserError
from batchgen.world import World
from tests import tiny_models as models
from tests.engines import engine_rank
from tests.engines.ds_zero import zero_matrix
from tests.engines.runs import OUT_OF_MEMORY, altered, command, ended_by, rows, run, texts, texts_alone

SETS = (1, 7, 50)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four key/value heads: it can be split over four ranks, and over three unevenly."""
    return models.save(tmp_path_factory.mktemp("models") / "llama", partial(models.llama, num_key_value_heads=4))


def compare(model: Path, ranks: int, settings: Sequence[str], scratch: Path, sets: Sequence[int], most: int) -> None:
    """Texts and logprobs of `ranks` ranks against those of one process."""
    found = engine_rank.ranks(ranks, model, settings, scratch / "ranks", sets, most, engine="ds-inference")
    logprobs = engine_rank.logprobs(scratch / "ranks")
    for count in sets:
        expected = zero_matrix.alone(model, engine_rank.prompts(count, most))
        assert found[count] == {index: one.text for index, one in expected.items()}, f"{count} prompts"
        zero_matrix.check_logprobs(logprobs[count], expected)


@pytest.mark.slow
def test_llama_over_three_ranks_says_what_it_says_alone(llama: Path, tmp_path: Path) -> None:
    compare(llama, 3, ["tp=3"], tmp_path, SETS, 40)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "tp", "sets"), [(2, 2, SETS), (4, 4, (7,))])
def test_bloom_over_ranks_says_what_it_says_alone(
    ranks: int, tp: int, sets: Sequence[int], tiny_bloom: Path, tmp_path: Path
) -> None:
    compare(tiny_bloom, ranks, [f"tp={tp}"], tmp_path, sets, 40)


@pytest.mark.slow
def test_smollm2_with_its_three_heads_over_two_ranks(tmp_path: Path) -> None:
    compare(prepare_default(cache_folder(os.environ), print), 2, [], tmp_path, (7,), 12)


@pytest.mark.slow
def test_a_pickled_checkpoint_is_read_too(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in llama.iterdir():
        if file.suffix != ".safetensors":
            (pickled / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(llama / "model.safetensors"), pickled / "pytorch_model.bin")
    compare(pickled, 2, [], tmp_path, (7,), 40)


@pytest.mark.slow
def test_a_killed_rank_ends_its_group_and_the_run_goes_on_over_another_number(llama: Path, tmp_path: Path) -> None:
    prompts, out = rows(tmp_path / "p.jsonl", 36, bad=(5, 7)), tmp_path / "out"
    words = command(prompts, out, llama, "--batch-size", "2", "--heartbeat-seconds", "0.1", engine="ds-inference")
    assert "rank 1 died" in ended_by(signal.SIGKILL, [*words, "--tp", "2"], out)
    # Now two groups of two, and a stop that reaches a rank of one group alone.
    ended_by(signal.SIGUSR2, [*words, "--tp", "2", "--ranks", "4"], out, 10, attempt=2)
    ends = [json.loads(path.read_bytes()) for path in sorted(out.glob("attempts/00002-*.json"))]
    assert ends[0]["steps"] == ends[1]["steps"], "the ranks of a group leave at the same step"
    assert ends[2]["steps"] == ends[3]["steps"]
    assert run(*words).returncode == 3  # a rank alone
    assert texts(out) == texts_alone(prompts, llama, tmp_path / "one")


# For sitecustomize: rank 1 loads six seconds longer, and takes row 3 for finished.
APART = """
import os
if os.environ.get("RANK") == "1":
    import time
    from batchgen.runs import schedule
    from batchgen.tensor_parallel import shard
    copy_weights, open_rows = shard.copy_weights, schedule.open_rows
    def slowly(*arguments, **options):
        time.sleep(6)
        return copy_weights(*arguments, **options)
    shard.copy_weights = slowly
    schedule.open_rows = lambda *arguments: (row for row in open_rows(*arguments) if row != 3)
"""


@pytest.mark.slow
def test_loading_may_take_longer_than_patience_and_ranks_with_other_rows_generate_nothing(
    llama: Path, tmp_path: Path
) -> None:
    prompts, out = rows(tmp_path / "p.jsonl", 12), tmp_path / "out"
    words = [*command(prompts, out, llama, engine="ds-inference"), "--tp", "2", "--batch-size", "4"]
    words += ["--set", "timeout_seconds=2", "--heartbeat-seconds", "0.2"]
    ended = run(*words, environment=altered(tmp_path, APART))
    assert ended.returncode == 75, ended.stderr
    assert "no step for" not in ended.stderr
    assert "have not found the same rows finished" in ended.stderr
    recorded = (out / "timing.jsonl").read_text() if (out / "timing.jsonl").exists() else ""
    assert sum(json.loads(line)["prompts"] for line in recorded.splitlines()) == 0
    assert run(*words).returncode == 0
    assert texts(out) == texts_alone(prompts, llama, tmp_path / "one")


# For sitecustomize: rank 1 has no room for more than 1 MB at once.
SMALL = """
import os
if os.environ.get("RANK") == "1":
    import torch
    empty = torch.empty
    def small(*size, **options):
        if len(size) == 1 and isinstance(size[0], int) and size[0] > 10**6:
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        return empty(*size, **options)
    torch.empty = small
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp", "fault", "most", "attempts", "count"),  # of rows, which come in three lengths
    [(2, SMALL, 16, 1, 48), (2, OUT_OF_MEMORY, 6, 2, 18), (1, OUT_OF_MEMORY.replace('== "1"', '!= ""'), 6, 1, 18)],
    ids=["before a batch", "inside one", "inside one, alone"],
)
def test_out_of_memory_of_one_rank_shrinks_the_batches_of_its_group(
    tp: int, fault: str, most: int, attempts: int, count: int, llama: Path, tmp_path: Path
) -> None:
    prompts, out = rows(tmp_path / "p.jsonl", count), tmp_path / "out"
    words = command(prompts, out, llama, "--batch-size", str(most), "--tp", str(tp), engine="ds-inference")
    done = run(*words, environment=altered(tmp_path, fault))
    assert done.returncode == 0, done.stderr
    made = len(list(out.glob("attempts/?????.json")))
    assert made == 1 if attempts == 1 else made >= 2, done.stderr
    sizes = [json.loads(line)["prompts"] for line in (out / "timing.jsonl").read_text().splitlines()]
    assert max(sizes) < most
    assert texts(out) == texts_alone(prompts, llama, tmp_path / "one")


@pytest.mark.slow
def test_a_run_goes_on_from_files_split_by_rank(llama: Path, tmp_path: Path) -> None:
    prompts, out, parts = rows(tmp_path / "p.jsonl", 40), tmp_path / "out", tmp_path / "parts"
    words = [*command(prompts, out, llama, engine="ds-inference"), "--tp", "2"]
    made = run(words[0], "-m", "batchgen", "split", llama, parts, "--tp", "2", "--dtype", "float32")
    assert made.returncode == 0, made.stderr
    assert made.stdout == f"{parts}\n"
    ended_by(signal.SIGKILL, [*words, "--batch-size", "2", "--heartbeat-seconds", "0.1"], out)
    words[words.index(str(llama))] = str(parts)
    words[words.index("ds-inference")] = "paged"  # the other engine that reads them
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert texts(out) == texts_alone(prompts, llama, tmp_path / "one")
    words[words.index("paged")] = "ds-inference"
    (out / "generations.jsonl").unlink()  # all rows are good: nothing but the output is made again
    again = run(*words)
    assert (again.returncode, "loaded in" in again.stderr) == (0, False), again.stderr
    assert texts(out) == texts_alone(prompts, llama, tmp_path / "two")
    # What does not fit is a sentence.
    wrong = run(*words[:-1], "1", "-o", tmp_path / "another")
    assert wrong.returncode == 4
    assert f"{parts} is split over 2 ranks, and a group of this run has 1" in wrong.stderr
    with pytest.raises(UserError, match="which only ds-inference and paged read, with --tp 2"):
        texts_alone(prompts, parts, tmp_path / "whole")


@pytest.mark.slow
def test_8_bits_say_the_same_from_the_model_and_from_split_files(llama: Path, tmp_path: Path) -> None:
    prompts = rows(tmp_path / "p.jsonl", 20)
    words = [*command(prompts, tmp_path / "eight", llama, engine="ds-inference"), "--tp", "2", "--dtype", "int8"]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    parts = tmp_path / "parts"
    assert run(words[0], "-m", "batchgen", "split", llama, parts, "--tp", "2", "--dtype", "int8").returncode == 0
    words[words.index(str(llama))] = str(parts)
    words[words.index(str(tmp_path / "eight"))] = str(tmp_path / "split")
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path / "split") == texts(tmp_path / "eight")
    assert texts(tmp_path / "eight") != texts_alone(prompts, llama, tmp_path / "one")
    refused = run(*words, "--dtype", "float32", "-o", tmp_path / "refused")
    assert refused.returncode == 4
    assert "holds weights of type int8, and the run is to have float32: give --dtype int8" in refused.stderr


def test_groups_are_streams_whose_first_ranks_write() -> None:
    kind = find("ds-inference")
    options = parse_options(kind, ["tp=2"])
    streams = [kind.stream(World(rank, rank, 4, 4), options) for rank in range(4)]
    assert streams == [Stream(0, 2, True), Stream(0, 2, False), Stream(1, 2, True), Stream(1, 2, False)]


@pytest.mark.parametrize(
    ("world", "tp", "sentence"),
    [
        (World(0, 0, 4, 4), 3, r"tp=3 does not divide the 4 ranks of this run.*choose a tp of 1, 2, 4"),
        (World(), 2, r"tp=2 does not divide the 1 rank of this run: start a multiple of 2 \(--gpus 2"),
        (World(0, 0, 12, 6), 4, r"tp=4 with 6 ranks a node: a group would lie across nodes"),
        (World(), 0, "tp=0: must be 1 or more"),
    ],
)
def test_groups_that_cannot_be_are_sentences(world: World, tp: int, sentence: str) -> None:
    kind = find("ds-inference")
    with pytest.raises(EngineError, match=sentence):
        kind.stream(world, parse_options(kind, [f"tp={tp}"]))


def test_a_model_of_two_heads_is_refused_over_four_ranks(tiny_llama: Path) -> None:
    kind = find("ds-inference")
    setup = Setup(str(tiny_llama), "float32", 1, World(0, 0, 4, 4))
    with pytest.raises(EngineError, match=r"tp=4: this model has 2 key/value heads.*tp can be 1 to 2"):
        kind(setup, parse_options(kind, []))
