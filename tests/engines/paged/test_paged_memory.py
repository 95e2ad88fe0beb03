"""Engine `paged` where memory runs out, and its self-test."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from batchgen.checkpoint import RunFolder
from batchgen.engine import EngineError, Setup
from batchgen.engines.paged.engine import Paged
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.sizing import CacheLesson
from batchgen.generation import selftest
from batchgen.generation.selftest import SelfTest
from batchgen.models import footprint
from batchgen.models.definition.errors import ModelError
from batchgen.types import Prompt, SamplingParams
from batchgen.world import World
from tests import tiny_models as models
from tests.engines.paged.test_paged import load, prompts, texts


def test_rows_that_do_not_fit_are_failed_rows(tiny_llama: Path) -> None:
    rows = models.random_prompts(6, max_new_tokens=20)
    rows[3].tokens = [models.BEGIN] * 200
    with load(tiny_llama, "cache_tokens=128") as engine:
        generations = texts(engine, rows)
    failed = [row for row in generations.values() if row.error is not None]
    assert [row.id for row in failed] == ["row-3"]
    assert failed[0].error is not None
    assert "200 prompt tokens and up to 20 new ones do not fit" in failed[0].error.message


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# What these tests strike is not what a GPU runs: there a forward is a graph, captured once, over kernels.
plain_path = pytest.mark.skipif(torch.cuda.is_available(), reason="strikes the path of the CPU")


def test_each_attempt_of_a_group_begins_below_the_smallest_cache_that_was_too_large(tiny_llama: Path) -> None:
    def pages(limits: Mapping[int, int]) -> int:
        setup = Setup(str(tiny_llama), "float32", 16, World(), selftest=False, limits=limits)
        with Paged(setup, Paged.Options(cache_tokens=1600)) as engine:
            assert engine._runner is not None
            return engine._runner.pages

    assert pages({}) == 100
    # Nine groups, or shards, may have run out of memory in one attempt, each with a cache of about this size.
    assert pages({1600 - PAGE_SIZE * group: 2 for group in range(9)}) == int(92 * 0.85)
    assert pages({1600: 2, 800: 2}) == int(50 * 0.85)
    for small in (PAGE_SIZE, 25 * PAGE_SIZE):
        with pytest.raises(EngineError, match="out of memory in a forward, however small the cache"):
            pages({small: 2})


def test_the_lesson_of_a_cache_that_was_too_large_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    error = CacheLesson(110).to_error()
    folder.add_limit(1, 0, {}, error.length, error.rows // 2)
    assert CacheLesson.read(folder.limits({})) == [CacheLesson(110)]


@plain_path
def test_the_cache_takes_memory_as_it_fills(tiny_llama: Path) -> None:
    config = models.Model(tiny_llama).model.config
    with load(tiny_llama, selftest=False) as engine:
        texts(engine, prompts(30))  # what a process takes once
    before = resident()
    with load(tiny_llama, batch_size=4000, selftest=False) as engine:
        assert engine._runner is not None
        whole = engine._runner.pages * PAGE_SIZE * footprint.cache_bytes_per_token(config, footprint.CacheFormat(4))
        assert whole > 100 << 20
        assert resident() - before < whole / 4
        texts(engine, prompts(30))
        assert resident() - before < whole / 2


class FailingForward:
    """Lets the forwards of these numbers, counted from 1, fail; by default as on a full GPU."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, calls: Sequence[int], error: type[RuntimeError] = torch.OutOfMemoryError
    ) -> None:
        self.count = 0
        embedding = torch.nn.functional.embedding

        def full(*arguments: object, **options: object) -> torch.Tensor:
            self.count += 1
            if self.count in calls:
                raise error("CUDA out of memory. (injected)" if error is torch.OutOfMemoryError else "no such thing")
            return embedding(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(torch.nn.functional, "embedding", full)


@plain_path
def test_out_of_memory_makes_the_cache_smaller_and_changes_no_text(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = prompts(30)
    for row in rows[::2]:
        row.params = SamplingParams(max_new_tokens=30, temperature=1.0, logprobs=True)
    with load(tiny_llama, "cache_tokens=2000", selftest=False) as engine:
        expected = texts(engine, rows)
    with load(tiny_llama, "cache_tokens=2000", selftest=False) as engine:
        FailingForward(monkeypatch, calls=(3, 4, 20))
        generations = texts(engine, rows)
    for row in rows:
        logprobs, before = generations[row.id].logprobs, expected[row.id].logprobs
        assert logprobs == before if before is None else logprobs == pytest.approx(before, abs=1e-4)
        generations[row.id].logprobs = before
    assert generations == expected
    cache = r"out of memory in a forward; going on with a cache of (\d+) tokens"
    assert len([record for record in caplog.records if record.getMessage().startswith(cache[:26])]) == 3


def test_memory_that_is_never_enough_ends_with_a_sentence(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(tiny_llama, selftest=False) as engine:
        FailingForward(monkeypatch, calls=range(1, 1000))
        with pytest.raises(EngineError, match=r"however small the cache; use --set step_tokens=1024"):
            texts(engine, prompts(4))


def test_any_other_error_of_the_first_step_is_the_model_s(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(tiny_llama) as engine:
        FailingForward(monkeypatch, calls=range(1, 1000), error=RuntimeError)
        with pytest.raises(ModelError, match=r"cannot generate with the model in .*: RuntimeError: no such thing"):
            texts(engine, prompts(4))


@plain_path
def test_any_other_error_of_a_later_step_leaves(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(tiny_llama) as engine:
        FailingForward(monkeypatch, calls=(3,), error=RuntimeError)
        with pytest.raises(RuntimeError, match=r"^no such thing$"):
            texts(engine, prompts(4))


@plain_path
def test_the_first_rows_are_looked_at_again_alone(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(tiny_llama) as engine:
        monkeypatch.setattr("batchgen.engines.paged.layout.PAGE_SIZE", 8)  # keys land in wrong places of their pages
        with pytest.raises(EngineError, match=r"self-test: .* Batches change the text"):
            texts(engine, prompts(20))


@plain_path
def test_rows_that_end_at_once_are_not_all_that_is_looked_at(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    check = SelfTest.check

    def counted(test: SelfTest, prompt: Prompt, tokens: Sequence[int]) -> None:
        looked.append(len(tokens))
        check(test, prompt, tokens)

    monkeypatch.setattr(SelfTest, "check", counted)
    rows = models.random_prompts(12, max_new_tokens=40)
    rows[3].params = SamplingParams(max_new_tokens=1, temperature=1.0)
    rows[5].params = SamplingParams(max_new_tokens=2)
    with load(tiny_llama) as engine:
        texts(engine, rows)
    assert len(looked) == selftest.ROWS
    assert min(looked) >= selftest.TOKENS // 2


def test_a_self_test_without_memory_loses_no_row(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. (injected)")

    monkeypatch.setattr(SelfTest, "check", full)
    with load(tiny_llama) as engine:
        texts(engine, prompts(30))
    assert "there is no memory for the self-test" in caplog.text


@plain_path
def test_a_cache_that_became_smaller_serves_again(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = prompts(30)
    with load(tiny_llama, "cache_tokens=600", selftest=False) as engine:
        expected = texts(engine, rows)
        with pytest.MonkeyPatch.context() as patch:
            FailingForward(patch, calls=(3,))
            assert texts(engine, rows) == expected
        assert texts(engine, rows) == expected
