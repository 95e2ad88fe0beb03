"""Rows of several samples: a row is recorded once, and only when all its samples are there."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen import Host, RunSettings, run
from batchgen.checkpoint import RunFolder, Writer
from batchgen.planning.work import Work
from batchgen.runs.samples import Samples
from batchgen.types import Batch, Generation, Prompt, SamplingParams, Shard
from tests.checkpoint.folders import render
from tests.commands.starts import ENVIRONMENT, Started, batchgen, call, found, read_rows, recorded, until, write_rows

COUNTS = (1, 2, 3, 5)


def prompt(index: int, n: int, temperature: float = 1.0) -> Prompt:
    return Prompt(index, f"row-{index}", index + 1, "", [1, 2], SamplingParams(n=n, temperature=temperature), {})


def generated(one: Prompt) -> Generation:
    return Generation.of(one, f"{one.index}.{one.sample}", "stop", 3)


rows = st.lists(st.tuples(st.sampled_from(COUNTS), st.booleans()), min_size=1, max_size=12)


@given(rows=rows, failing=st.sets(st.integers(0, 40)), data=st.data())
def test_each_row_comes_out_once_and_whole_in_whatever_order_its_samples_end(
    rows: Sequence[tuple[int, bool]], failing: set[int], data: st.DataObject
) -> None:
    samples = Samples()
    prompts = [prompt(index, n, float(is_sampled)) for index, (n, is_sampled) in enumerate(rows)]
    given_out = list(samples.spread(prompts))
    assert [(one.index, one.sample) for one in given_out] == [
        (index, sample) for index, (n, is_sampled) in enumerate(rows) for sample in range(n if is_sampled else 1)
    ]
    assert len({one.row_seed for one in given_out}) == len(given_out)
    shuffled = data.draw(st.permutations(list(enumerate(given_out))))
    failed = {(one.index, one.sample) for number, one in enumerate(given_out) if number in failing}
    joined: dict[int, Generation] = {}
    padded = repeated = 0
    while shuffled:
        size = data.draw(st.integers(1, 5))
        part, shuffled = shuffled[:size], shuffled[size:]
        batch = Batch(
            [Generation.failed(one, "engine", "x") if number in failing else generated(one) for number, one in part], 1
        )
        finished = samples.join(batch)
        padded, repeated = padded + finished.padded_tokens, repeated + finished.repeated_tokens
        assert finished.generations or not finished.padded_tokens, "its figures go with the next batch that has a row"
        for one in finished.generations:
            assert one.index not in joined
            joined[one.index] = one
        is_open = {one.index for _, one in shuffled}
        assert joined.keys() == set(range(len(rows))) - is_open
    for index, (n, is_sampled) in enumerate(rows):
        one = joined[index]
        assert one.sample == 0
        if any((index, sample) in failed for sample in range(n)):
            assert (one.error is not None, one.text, list(one.others)) == (True, None, [])
            continue
        texts = [f"{index}.{sample if is_sampled else 0}" for sample in range(n)]
        assert [one.text, *(other.text for other in one.others)] == texts
        assert [other.sample for other in one.others] == list(range(1, n))
    assert padded > 0
    greedy = [n - 1 for index, (n, is_sampled) in enumerate(rows) if not is_sampled and (index, 0) not in failed]
    assert repeated == 3 * sum(greedy)


def test_a_record_counts_what_was_generated_and_no_repetition(tmp_path: Path) -> None:
    samples = Samples()
    given_out = list(samples.spread([prompt(0, 3), prompt(1, 4, temperature=0.0), prompt(2, 1)]))
    writer = Writer(tmp_path, 1, 0, 0, render)
    record = writer.commit(samples.join(Batch([generated(one) for one in given_out])), 1.0)
    writer.close()
    assert (record.prompts, record.rows, record.failed) == (3, [0, 1, 2], [])
    assert record.generated_tokens == 3 * len(given_out) == 15
    assert record.prompt_tokens == 3 * 2, "a row's prompt counts once"


def test_a_forecast_counts_samples_as_rows_that_share_their_prompt() -> None:
    prompts = [prompt(0, 3), prompt(1, 4, temperature=0.0), prompt(2, 1)]
    work = Work.of(prompts, drawn=4, total=40)
    assert work.lengths == [(2, 128)] * 5
    assert work.rows == 50
    assert work.prompt_share == pytest.approx(3 / 5)
    assert Work.of([], 3, 30) == Work([], 0, 1.0)


def test_a_run_killed_at_random_places_generates_and_records_each_row_once(tmp_path: Path) -> None:
    rows = [
        {"id": f"r{number}", "prompt": f"{number}", "temperature": 1, "n": COUNTS[number % 4]} for number in range(40)
    ]
    path, draw = write_rows(tmp_path / "p.jsonl", rows), random.Random(4)
    words = ["run", path, "-o", "out", "--engine", "echo", "--set", "seconds=0.01", "--batch-size"]
    out, kills = tmp_path / "out", 0
    while kills < 3:
        before = recorded(out)
        with Started(batchgen(*words, draw.choice((2, 3, 7)), "--ranks", draw.choice((1, 2))), tmp_path) as process:
            enough = before + draw.randint(1, 8)
            until(lambda least=enough: recorded(out) >= least, process)
            process.send(signal.SIGKILL)
            process.end()
        kills += 1
    assert recorded(out) < 40
    assert call(tmp_path, *words, 4).code == 0
    written = [row for path in sorted(out.glob("generations-*.jsonl")) for row in read_rows_before_the_kill(path)]
    assert Counter(row["id"] for row in written) == {f"r{number}": 1 for number in range(40)}
    assert [len(row.get("texts") or [row["text"]]) for row in read_rows(out / "generations.jsonl")] == [
        row["n"] for row in rows
    ]


def read_rows_before_the_kill(generations: Path) -> list[dict[str, Any]]:
    """The rows of a generations file that a record covers."""
    folder = RunFolder(generations.parent)
    ends = [record.end for path, record in folder.records(verify=True) if path == generations]
    lines = generations.read_bytes()[: max(ends, default=0)]
    scratch = generations.with_suffix(".read")
    scratch.write_bytes(lines)
    return read_rows(scratch)


@pytest.fixture(scope="module")
def sampled(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Forty rows of 1 to 5 samples, and what they become in one process that nobody stops."""
    folder, letters = tmp_path_factory.mktemp("samples"), random.Random(3)
    rows = [
        {
            "id": f"r{number}",
            "prompt": "".join(letters.choice("abcdefgh ijk") for _ in range(letters.randint(1, 40))),
            "temperature": 1 if number % 8 else 0,
            "max_new_tokens": 8 + number % 3,
            "n": COUNTS[number % 4],
        }
        for number in range(40)
    ]
    path = write_rows(folder / "p.jsonl", rows)
    return path, generate(path, tiny_llama, folder / "alone", "accelerate", batch_size=6)


def generate(
    path: Path, model: Path, out: Path, engine: str, batch_size: int | None = None, shard: Shard | None = None
) -> list[dict[str, Any]]:
    settings = RunSettings(model=str(model), engine=engine, dtype="float32", batch_size=batch_size)
    status = run(str(path), out, settings, host=Host(ENVIRONMENT, shard=shard or Shard()))
    return read_rows(out / "generations.jsonl") if status.merged else []


def texts_of(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [row.get("texts") or [row["text"]] for row in rows]


def test_samples_differ_and_do_not_depend_on_their_number(
    sampled: tuple[Path, list[dict[str, Any]]], tiny_llama: Path, tmp_path: Path
) -> None:
    path, expected = sampled
    rows = read_rows(path)
    for row, texts in zip(rows, texts_of(expected), strict=True):
        assert len(texts) == row["n"]
        assert len(set(texts)) == (row["n"] if row["temperature"] else 1)
    fewer = write_rows(tmp_path / "p.jsonl", [{**row, "n": max(1, int(row["n"]) - 1)} for row in rows])
    kept = texts_of(generate(fewer, tiny_llama, tmp_path / "out", "accelerate", batch_size=11))
    assert kept == [texts[: max(1, len(texts) - 1)] for texts in texts_of(expected)]


def test_samples_in_any_shards_with_any_engine(
    sampled: tuple[Path, list[dict[str, Any]]], tiny_llama: Path, tmp_path: Path
) -> None:
    path, expected = sampled
    for index, (engine, batch_size) in enumerate((("accelerate", 4), ("paged", 3), ("accelerate", 30))):
        rows = generate(path, tiny_llama, tmp_path / "out", engine, batch_size, Shard(index, 3))
    assert texts_of(rows) == texts_of(expected)


@pytest.mark.slow
def test_samples_after_kills_with_other_engines_and_ranks(
    sampled: tuple[Path, list[dict[str, Any]]], tiny_llama: Path, tmp_path: Path
) -> None:
    path, expected = sampled
    words = ["run", path, "-o", "out", "--model", tiny_llama, "--dtype", "float32", "--batch-size"]
    out, environment = tmp_path / "out", {"OMP_NUM_THREADS": "1"}
    for engine, ranks in (("accelerate", 2), ("accelerate", 1)):
        before = recorded(out)
        command = batchgen(*words, 2, "--engine", engine, "--ranks", ranks)
        with Started(command, tmp_path, environment) as process:
            until(lambda least=before + 4: recorded(out) >= least, process)
            process.send(signal.SIGKILL)
            process.end()
    assert found(out).open
    assert texts_of(generate(path, tiny_llama, out, "paged")) == texts_of(expected)
    assert len(found(out).attempts) == 3
