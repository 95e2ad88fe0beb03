"""A step in flight: it has been launched, and its tokens have not been read yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchgen.engines.paged.step import Sequence, Step


@dataclass
class LaunchedStep:
    """A step in flight, and the buffers of the host that its tokens arrive in."""

    step: Step
    _tokens: torch.Tensor  # [slots], the first of them those of the step's rows
    _logprobs: torch.Tensor  # [slots], the first of them those of the rows in `step.logprob_rows`
    _arrival: torch.cuda.Event | None  # when both have come; None: they are there

    def wait(self) -> None:
        """Waits until the step has been made."""
        if self._arrival is not None:
            self._arrival.synchronize()

    def read_tokens(self) -> list[int]:
        """Waits for the tokens chosen for the step's rows, and reads them."""
        self.wait()
        return self._tokens[: len(self.step.rows)].tolist()

    def read_logprobs(self) -> list[tuple[Sequence, float]]:
        """Reads the log-probabilities of those tokens, for the sequences that want them; after `read_tokens`."""
        rows, sequences = self.step.logprob_rows, self.step.sequences
        values = self._logprobs[: len(rows)].tolist()
        return [(sequences[row], value) for row, value in zip(rows, values, strict=True)]
