"""Rows of several texts: a prompt for the engine for each of them, and one generation of the run for each row.

A row has several samples of its prompt, several prompts, or both. An engine never sees how many texts a row has. What
is finished of a row whose other texts are still in work is held back and is not recorded, so that a row is done when
all its texts are; after a stop, such a row is generated again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from batchgen.types import Batch, Generation, Prompt


@dataclass(slots=True)
class _Row:
    """A row in work that has several texts."""

    count: int  # samples of each of its prompts
    prompts: int
    is_repeated: bool  # it is greedy: one text is generated of each prompt, and stands for all samples
    finished: list[Generation] = field(default_factory=list)  # in the order in which they ended

    @property
    def is_whole(self) -> bool:
        return len(self.finished) == self.prompts * (1 if self.is_repeated else self.count)


class Samples:
    """The samples of one stream's rows. It holds no more than the rows that the engine has in work."""

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}  # those with several samples, by their number
        self._held_back = Batch([])  # figures of batches of which nothing was recorded

    def spread(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """Gives the prompts for an engine: the samples of a prompt come one after the other and share their prefix.

        A greedy prompt is given once, since all its samples would be the same text.
        """
        for prompt in prompts:
            count = prompt.params.n
            if count == 1 and not prompt.others:
                yield prompt
                continue
            is_repeated = prompt.params.temperature == 0
            self._rows[prompt.index] = _Row(count, 1 + len(prompt.others), is_repeated)
            for place, each in enumerate((prompt, *prompt.others)):
                samples = range(place * count, place * count + (1 if is_repeated else count))
                yield from (replace(each, sample=sample, others=()) for sample in samples)

    def join(self, batch: Batch) -> Batch:
        """Gives the rows that are whole with this batch: the first sample of each, with the others in it, in order.

        A row one of whose samples has failed is that failure, and its other samples are left out. The figures of
        batches whose every row was held back are added to those of the next one.
        """
        if not self._rows:
            return batch
        rows: list[Generation] = []
        repeated = 0
        for generation in batch.generations:
            row = self._rows.get(generation.index)
            if row is None:
                rows.append(generation)
                continue
            row.finished.append(generation)
            if row.is_whole:
                del self._rows[generation.index]
                rows.append(joined := _join(row))
                if row.is_repeated:
                    texts = (joined, *joined.others)
                    repeated += sum(text.generated_tokens for text in texts if text.sample % row.count)
        before, self._held_back = self._held_back, Batch([])
        figures = _add(before, batch)
        if not rows:
            self._held_back = figures
            return Batch([])
        return replace(figures, generations=rows, repeated_tokens=repeated)


def _join(row: _Row) -> Generation:
    samples = sorted(row.finished, key=lambda generation: generation.sample)
    failed = next((sample for sample in samples if sample.error is not None), None)
    if failed is not None:
        return replace(failed, sample=0)
    if row.is_repeated:
        samples = [replace(sample, sample=sample.sample + number) for sample in samples for number in range(row.count)]
    tokens = sum(sample.prompt_tokens for sample in samples[:: row.count])
    return replace(samples[0], others=tuple(samples[1:]), prompt_tokens=tokens)


def _add(before: Batch, batch: Batch) -> Batch:
    """The figures of both, without generations."""
    return Batch(
        [],
        before.padded_tokens + batch.padded_tokens,
        _larger(before.peak_memory_bytes, batch.peak_memory_bytes),
        before.share_of_bound if batch.share_of_bound is None else batch.share_of_bound,
        _larger(before.at_once, batch.at_once),
    )


def _larger(left: int | None, right: int | None) -> int | None:
    return max((number for number in (left, right) if number is not None), default=None)
