"""What a bench generates: the seed's batches, and jobs whose sizes others have measured too."""

from __future__ import annotations

import pytest

from batchgen.bench import workloads


def test_the_seeds_sentences_are_repeated_up_to_the_batch() -> None:
    made = workloads.batch(lambda texts: [text.encode() for text in texts], 20, 100)
    texts = [bytes(prompt.tokens).decode() for prompt in made]
    assert texts == [*workloads.SENTENCES, *workloads.SENTENCES, *workloads.SENTENCES[:4]]
    assert {prompt.params.max_new_tokens for prompt in made} == {100}
    assert {prompt.params.temperature for prompt in made} == {0}
    assert [prompt.index for prompt in made] == list(range(20))


# The sums are those of the jobs that other systems were measured with.
@pytest.mark.parametrize(
    ("rows", "prompt", "new", "total"), [(1024, (32, 512), (16, 512), 130_186), (8192, (16, 64), (16, 128), 423_097)]
)
def test_a_job_of_unequal_lengths_is_the_same_everywhere(
    rows: int, prompt: tuple[int, int], new: tuple[int, int], total: int
) -> None:
    made = workloads.mixed(rows, 250_880, prompt, new)
    assert sum(one.params.max_new_tokens for one in made) == total
    lengths = [len(one.tokens) for one in made]
    assert (min(lengths), max(lengths)) == prompt
    assert {one.params.max_new_tokens for one in made} <= set(range(new[0], new[1] + 1))
    assert all(4 <= token < 32_000 for one in made for token in one.tokens)
    assert made == workloads.mixed(rows, 250_880, prompt, new)
