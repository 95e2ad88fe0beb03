"""Which rows of a run are finished, as its batch records say, and what they have taken."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from batchgen.checkpoint.files import CheckpointError
from batchgen.types import BatchRecord, Shard

OPEN, FAILED, GOOD = 0, 1, 2  # what is known of a row; one byte each, so that ten million rows take 10 MB


@dataclass(slots=True)
class Done:
    """What all attempts together have finished, by row number."""

    states: bytearray  # OPEN, FAILED or GOOD for every row
    prompt_tokens: int = 0
    generated_tokens: int = 0
    batches: int = 0
    reasoning_tokens: int = 0
    incomplete: int = 0  # rows whose text was cut before it was what their constraint demands
    attempt_tokens: dict[int, int] = field(default_factory=dict)  # committed generated tokens of each attempt

    def add(self, record: BatchRecord) -> None:
        """Takes what a record says: a row is good if any record of it is, and failed if all of them are."""
        states, failed = self.states, set(record.failed)
        self.incomplete += sum(states[row] != GOOD for row in record.incomplete)
        for row in record.rows:
            if row not in failed:
                states[row] = GOOD
            elif states[row] == OPEN:
                states[row] = FAILED
        self.prompt_tokens += record.prompt_tokens
        self.generated_tokens += record.generated_tokens
        self.reasoning_tokens += record.reasoning_tokens
        self.batches += 1
        tokens = self.attempt_tokens.get(record.attempt, 0)
        self.attempt_tokens[record.attempt] = tokens + record.generated_tokens

    def is_good(self, row: int) -> bool:
        """The row has its generation: no start touches it again."""
        return self.states[row] == GOOD

    def is_failed(self, row: int) -> bool:
        """The row has an error and no generation: the next start tries it again."""
        return self.states[row] == FAILED

    def part(self, shard: Shard) -> Done:
        """What is finished of the shard's rows alone. They lose their numbers: it is for counting."""
        return replace(self, states=self.states[shard.index :: shard.count])

    @property
    def good(self) -> int:
        """Rows with a generation."""
        return self.states.count(GOOD)

    @property
    def failed(self) -> int:
        """Rows whose every attempt failed."""
        return self.states.count(FAILED)

    @property
    def has_rows_to_do(self) -> bool:
        """Whether a start would generate any row: one that is open, or that has failed so far."""
        return self.good < len(self.states)

    @property
    def open(self) -> int:
        """Rows that no attempt has finished."""
        return self.states.count(OPEN)


def check_rows(path: Path, record: BatchRecord, rows: int) -> None:
    """Raises CheckpointError if `record`, of the generations file `path`, does not fit an input of `rows` rows."""
    if record.rows and not 0 <= min(record.rows) <= max(record.rows) < rows:
        raise CheckpointError(
            f"{path} holds row {max(record.rows)}, but rows of this run are below {rows}: the file is of another run. "
            "Move it and its batches file away, and start again"
        )
