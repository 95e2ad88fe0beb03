"""A step in flight: its forward has been launched, and its tokens have not been read yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchgen.engines.paged.step import Step
from batchgen.generation.choice import TokenLogprobs
from batchgen.generation.prompt_logprobs import PromptTensors


@dataclass
class LaunchedStep:
    """A step in flight, and the buffers of the host that its tokens arrive in."""

    step: Step
    places: list[int]  # the slots of the step's rows, where a chooser is needed; sequences may have left them since
    slots: torch.Tensor | None  # the same on the device, [rows]
    logits: torch.Tensor | None  # of the rows, [rows or more, vocabulary], until tokens are chosen from them
    tokens: torch.Tensor  # [slots], the first of them those chosen for the step's rows, once they have arrived
    logprobs: TokenLogprobs | None = None  # of the rows that ask for them, likewise
    prompt_logprobs: PromptTensors | None = None  # of `step.prompt_rows`, likewise
    is_choice_launched: bool = False  # the choice of its tokens has been launched, too
    arrival: torch.cuda.Event | None = None  # when all has come; None: it is there

    def wait(self) -> None:
        """Waits until the step has been made."""
        if self.arrival is not None:
            self.arrival.synchronize()

    def read_tokens(self) -> list[int]:
        """Waits for the tokens chosen for the step's rows, and reads them."""
        self.wait()
        return self.tokens[: len(self.step.rows)].tolist()
