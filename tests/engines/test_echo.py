"""The engine that repeats its prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import batchgen
from batchgen import RunSettings
from batchgen.engine import EngineError, Setup
from batchgen.engines.echo import Echo
from batchgen.types import Batch, Prompt, SamplingParams
from batchgen.world import World
from tests.commands.starts import read_rows, write_rows


def prompt(index: int, text: str = "hello", max_new_tokens: int = 100, tokens: Sequence[int] | None = None) -> Prompt:
    ids = text.encode() if tokens is None else tokens
    return Prompt(index, f"row-{index}", index + 1, text, ids, SamplingParams(max_new_tokens=max_new_tokens), {"c": 1})


def engine(batch_size: int | None = None, **options: Any) -> Echo:
    return Echo(Setup("", "auto", batch_size, World()), Echo.Options(**options))


def run(prompts: Sequence[Prompt], batch_size: int | None = None) -> list[Batch]:
    return list(engine(batch_size).generate(iter(prompts), lambda: False))


def test_answers_with_the_prompt_and_keeps_its_columns() -> None:
    [batch] = run([prompt(0, "héllo")])
    [generation] = batch.generations
    assert (generation.text, generation.finish_reason) == ("héllo", "stop")
    assert (generation.prompt_tokens, generation.generated_tokens) == (6, 6)
    assert (generation.id, generation.columns, generation.error) == ("row-0", {"c": 1}, None)


def test_stops_at_max_new_tokens_also_within_a_letter() -> None:
    [batch] = run([prompt(0, "hé", max_new_tokens=2), prompt(1, "abc", max_new_tokens=3)])
    assert [(g.text, g.finish_reason) for g in batch.generations] == [("h\ufffd", "length"), ("abc", "stop")]
    assert [g.generated_tokens for g in batch.generations] == [2, 3]


def test_each_byte_could_only_be_what_it_is() -> None:
    asking = prompt(0, "hé", max_new_tokens=2)
    asking.params = SamplingParams(max_new_tokens=2, logprobs=True)
    [batch] = run([asking, prompt(1)])
    assert [g.logprobs for g in batch.generations] == [[0.0, 0.0], None]
    assert batch.generations[0].details.token_texts == ["h", "\udcc3"]


def test_answers_token_ids_with_their_text() -> None:
    [batch] = run([prompt(0, "", tokens=[104, 105])])
    assert batch.generations[0].text == "hi"


@pytest.mark.parametrize(("size", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (9, [5]), (None, [5])])
def test_batch_size_is_the_most_prompts_of_a_batch(size: int | None, sizes: list[int]) -> None:
    assert [len(batch.generations) for batch in run([prompt(n) for n in range(5)], size)] == sizes


def test_every_prompt_of_a_long_queue_is_in_one_batch() -> None:
    batches = run([prompt(number) for number in range(5000)])
    indices = itertools.chain.from_iterable([g.index for g in batch.generations] for batch in batches)
    assert list(indices) == list(range(5000))


def test_counts_tokens_as_it_goes() -> None:
    echo = engine(2)
    for done, _ in enumerate(echo.generate(iter([prompt(0), prompt(1), prompt(2), prompt(3)]), lambda: False), 1):
        assert echo.signs.generated_tokens == done * 2 * len("hello")


def test_stop_ends_it_without_pulling_any_further() -> None:
    pulled = 0

    def endless() -> Iterator[Prompt]:
        nonlocal pulled
        for number in itertools.count():
            pulled += 1
            yield prompt(number)

    batches = list(engine(3).generate(endless(), lambda: pulled >= 6))
    assert [len(batch.generations) for batch in batches] == [3, 3]
    assert pulled == 6
    assert list(engine().generate(endless(), lambda: True)) == []
    assert pulled == 6


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_seconds_must_be_a_time(seconds: float) -> None:
    with pytest.raises(EngineError, match="--set seconds must be a number, 0 or more"):
        Echo.Options(seconds)


def test_tokenizer_counts_bytes_and_renders_conversations() -> None:
    tokenizer = Echo.tokenizer("")
    assert [list(tokens) for tokens in tokenizer.tokenize(["é", ""], special=True)] == [[195, 169], []]
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == "user: Hi\n"


def test_rows_get_the_samples_that_they_ask_for_and_a_last_message_is_gone_on_with(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Name a colour"}, {"role": "assistant", "content": "Sure: "}]
    rows = [
        {"id": "prefill", "messages": messages, "continue_final_message": True},
        {"id": "whole", "messages": messages},
        {"id": "samples", "prompt": "a", "n": 4},
    ]
    settings = RunSettings(engine="echo")
    folder = batchgen.run(str(write_rows(tmp_path / "in.jsonl", rows)), tmp_path / "out", settings).folder
    prefill, whole, samples = read_rows(folder / "generations.jsonl")
    assert prefill["text"] == "user: Name a colour\nassistant: Sure: "
    assert whole["text"] == "user: Name a colour\nassistant: Sure: \n"
    assert samples["texts"] == ["a"] * 4
