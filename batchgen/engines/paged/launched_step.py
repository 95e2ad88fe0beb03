"""A step under way, and how its tokens come back from the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchgen.engines.paged.step import Sequence, Step


@dataclass
class Flight:
    """A step under way."""

    step: Step
    _tokens: torch.Tensor
    _logprobs: torch.Tensor  # of the tokens of the rows in `step.logprob_rows`
    _arrived: torch.cuda.Event | None

    def wait(self) -> None:
        """Until the step has been made."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def read(self) -> list[int]:
        """The tokens chosen for the step's rows; waits for them."""
        self.wait()
        return self._tokens[: len(self.step.rows)].tolist()

    def logprobs(self) -> list[tuple[Sequence, float]]:
        """Those of the tokens that have been `read`, of the sequences that ask for them."""
        asked, sequences = self.step.logprob_rows, self.step.sequences
        values = self._logprobs[: len(asked)].tolist()
        return [(sequences[row], value) for row, value in zip(asked, values, strict=True)]
